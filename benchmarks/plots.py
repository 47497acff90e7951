"""Draws results: `make plots`, or python -m benchmarks.plots. Each picture comes from one JSON file alone.

    results/plots/DEVICE-length.png    time and temporary memory against length
    results/plots/DEVICE-decode.png    bytes of keys and values a second against batch
    results/plots/DEVICE-roofline.png  where every case of ours lies under the ceilings of the machine
    results/plots/DEVICE-ratios.png    how many times as much each peer takes
    results/plots/DEVICE-memory.png    temporary memory on GPUs, as compiled without one

It rewrites the tables as well, so that they and the pictures show the same numbers.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks import table
from benchmarks.drawing import COLOURS, Row, by_peer, curves, label_points, legend_of, plain_numbers, style_of
from benchmarks.problems import BOTH, FORWARD

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

FOLDER = table.RESULTS / "plots"


def measured(results: dict[str, Any], *cases: str) -> list[Row]:
    """Rows that have a cost, of cases whose names begin so."""
    return [row for row in results["rows"] if row["cost"] is not None and row["case"].startswith(cases)]


# Each picture draws on a new figure, or returns None where there is nothing to show.


def draw_length(results: dict[str, Any]) -> Any:
    """Time and memory against length; a problem of several rows counts by the row."""
    rows = measured(results, "length-", "memory-")
    timed = [row for row in rows if row["unit"] == "ms"]
    if not timed:
        return None
    style = style_of(by_peer(rows))
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), layout="constrained")
    milliseconds = lambda row: 1e3 * row["cost"] / row["batch"]
    memory = lambda row: row["temporaries"] and row["temporaries"] / row["batch"] / 2**20
    for axis, direction in zip(axes, (FORWARD, BOTH)):
        curves(axis, [row for row in timed if row["direction"] == direction], "length", milliseconds, style)
        axis.set(title=f"time, {direction}", xlabel="length (tokens)", ylabel="milliseconds a call")
    curves(axes[2], [row for row in rows if row["direction"] == BOTH], "length", memory, style)
    axes[2].set(title=f"temporary memory, {BOTH}", xlabel="length (tokens)", ylabel="MiB")
    figure.suptitle(sizes_of(timed[0]["problem"]))
    legend_of(figure, axes)
    return figure


def sizes_of(problem: str) -> str:
    """Without what varies in a picture."""
    return re.sub(r"\b[BTS]=\d+ ", "", problem)


def draw_decode(results: dict[str, Any]) -> Any:
    rows = measured(results, "Llama-3-8B-decode-")
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    curves(axis, rows, "batch", lambda row: row["bandwidth"] / 1e9, style_of(by_peer(rows)))
    copy = results["ceilings"].get("copy")
    if copy:
        axis.axhline(copy / 1e9, color="black", linestyle="--", linewidth=1, label="a copy on this machine")
    axis.set(xlabel="rows of the batch", ylabel="GB/s that the step has to read and write")
    axis.set_title(f"A step of decoding, {rows[0]['length']:,} keys: {sizes_of(rows[0]['problem'])}")
    legend_of(figure, [axis])
    return figure


def draw_roofline(results: dict[str, Any]) -> Any:
    """Ours alone, under the ceilings of its dtype. What lies left of the corner is bound by memory."""
    rows = [row for row in results["rows"] if row["peer"] == "ours" and row["flops"] and row["direction"] != "backward"]
    ceilings = results["ceilings"]
    if not rows or "matmul" not in ceilings:
        return None
    figure, axis = plt.subplots(figsize=(11, 7), layout="constrained")
    intensities = np.array([row["flops"] / row["bandwidth"] for row in rows])
    x = np.geomspace(intensities.min() / 3, intensities.max() * 3, 200)
    for dtype, product in ceilings["matmul"].items():
        if any(row["problem"].endswith(dtype) for row in rows):
            axis.plot(x, np.minimum(product, x * ceilings["copy"]) / 1e9, color="black", linewidth=1.2)
            axis.annotate(
                f"matrix product in {dtype}: {table.figures(product / 1e9)} GFLOP/s",
                (x[-1], product / 1e9),
                (0, 5),
                textcoords="offset points",
                ha="right",
            )
    start = x[0] * 1.3
    axis.annotate(
        f"copy: {table.figures(ceilings['copy'] / 1e9)} GB/s",
        (start, start * ceilings["copy"] / 1e9),
        (8, -4),
        textcoords="offset points",
        va="top",
    )
    kinds = {FORWARD: (COLOURS[0], "o"), BOTH: (COLOURS[1], "s"), "": (COLOURS[2], "D")}
    for direction, (colour, marker) in kinds.items():
        found = [(row, place) for row, place in zip(rows, intensities) if row["direction"] == direction]
        if found:
            label = direction or "a step of training"
            speeds = [row["flops"] / 1e9 for row, _ in found]
            axis.scatter(
                [place for _, place in found], speeds, s=45, color=colour, marker=marker, label=label, zorder=3
            )
    axis.set(xscale="log", yscale="log", xlabel="FLOP for each byte that has to be moved", ylabel="GFLOP/s")
    plain_numbers(axis.xaxis)
    plain_numbers(axis.yaxis)
    axis.grid(alpha=0.3)
    axis.set_title("Ours under the ceilings of this machine")
    legend_of(figure, [axis])
    figure.draw_without_rendering()  # places are settled now
    label_points(axis, [(row["case"], place, row["flops"] / 1e9) for row, place in zip(rows, intensities)])
    return figure


def draw_ratios(results: dict[str, Any]) -> Any:
    """A point for each peer of each case: right of 1 we are better."""
    rows = [row for row in results["rows"] if row["ratio"] is not None and row["direction"] != "backward"]
    if not rows:
        return None
    name = lambda row: " ".join(filter(None, [row["case"], {BOTH: "f+b", FORWARD: "f"}.get(row["direction"])]))
    names = list(dict.fromkeys(map(name, rows)))
    style = style_of(by_peer(rows))
    figure, axis = plt.subplots(figsize=(10, 2 + 0.27 * len(names)), layout="constrained")
    for peer, found in by_peer(rows).items():
        heights = [names.index(name(row)) for row in found]
        axis.plot(
            [row["ratio"] for row in found], heights, label=peer, linestyle="", markersize=8, alpha=0.9, **style[peer]
        )
    axis.axvline(1, color="black", linewidth=1)
    axis.set(
        xscale="log", xlabel="cost of the peer / our cost: right of 1 we are better", ylim=(len(names) - 0.5, -0.5)
    )
    axis.set_yticks(range(len(names)), names, fontsize=9)
    plain_numbers(axis.xaxis)
    axis.grid(alpha=0.3)
    axis.set_title("f: forward, f+b: forward and backward", fontsize=10)
    legend_of(figure, [axis])
    return figure


def draw_memory(results: dict[str, Any]) -> Any:
    """Bars for each GPU problem, as compiled for an H100. What did not compile says why."""
    rows = [row for row in results.get("gpu_memory", {"rows": []})["rows"] if row["gpu"] == "h100"]
    rows = [row for row in rows if row["status"] != "not applicable"]
    if not rows:
        return None
    problems: dict[str, list[Row]] = {}
    for row in rows:
        problems.setdefault(f"{row['case']}: {row['problem']}, {row['direction']}", []).append(row)
    figure, axis = plt.subplots(figsize=(11, 1 + 0.27 * (len(rows) + 1.6 * len(problems))), layout="constrained")
    place, ticks = 0.0, {}
    for problem, found in problems.items():
        axis.text(MIN_VISIBLE * 1.15, place, problem, va="center", fontweight="bold", fontsize=9)
        for row in found:
            place += 1
            ticks[place] = row["peer"]
            size = row["temporaries"]
            length = max((size or 0) / 2**20, MIN_VISIBLE)  # nothing has no place on such an axis
            axis.barh(place, length, color=COLOURS[0] if row["peer"] == "ours" else "#9A9A9A")
            axis.annotate(f" {table.temporaries(row)}", (length, place), va="center", fontsize=9)
        place += 1.6
    axis.set(xscale="log", xlim=(MIN_VISIBLE, 1e6), xlabel="MiB of temporaries at the peak, as compiled for an H100")
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    axis.set_ylim(place - 0.8, -0.8)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, position: f"{x:,.12g}"))
    axis.grid(alpha=0.3, axis="x")
    axis.set_axisbelow(True)
    return figure


MIN_VISIBLE = 0.1  # MiB that can be seen


DRAWINGS = {
    "length": draw_length,
    "decode": draw_decode,
    "roofline": draw_roofline,
    "ratios": draw_ratios,
    "memory": draw_memory,
}


def draw(file: Path, folder: Path) -> list[Path]:
    """The pictures of one file of results."""
    results = json.loads(file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, drawing in DRAWINGS.items():
        figure = drawing(results)
        if figure is not None:
            written.append(folder / f"{file.stem}-{name}.png")
            figure.text(0.995, 0.005, f"{file.name}, {results['date']}", ha="right", fontsize=7, color="#666666")
            figure.savefig(written[-1], dpi=100, metadata={"Software": None})
            plt.close(figure)
    return written


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m benchmarks.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path in [*table.write(), *(path for file in table.result_files() for path in draw(file, FOLDER))]:
        print(path.relative_to(table.ROOT))
