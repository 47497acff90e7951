"""Results as a table: aligned on a terminal, or in Markdown.

python -m benchmarks.table benchmarks/results/cpu.json
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TITLES = ("case", "problem", "peer", "measured", "ours is better by", "largest error")


def figures(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"


UNITS: dict[str, Callable[[float], str]] = {  # a cost in seconds, bytes, or seconds a token
    "ms": lambda seconds: f"{figures(1e3 * seconds)} ms",
    "MiB": lambda size: f"{figures(size / 2**20)} MiB",
    "tokens/s": lambda seconds: f"{figures(1 / seconds)} tokens/s",
}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of `measure.Row`, in the order of TITLES. What was not measured says why."""
    measured = f"{row['status']}: {row['message']}" if row["cost"] is None else UNITS[row["unit"]](row["cost"])
    ratio = "" if row["ratio"] is None else f"{figures(row['ratio'])}x"
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    return row["case"], row["problem"], row["peer"], measured, ratio, error


def table(rows: Sequence[dict[str, Any]], leading: Sequence[str] = TITLES[:3]) -> list[tuple[str, ...]]:
    """Titles and lines. What was measured on a GPU has directions, not everything all: those of a peer share a line."""
    if not any("direction" in row for row in rows):
        return [TITLES, *map(cells, rows)]
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in leading), {})[row["direction"]] = row
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    rates = lambda found: (rate(found[direction]) if direction in found else "" for direction in directions)
    return [
        (*leading, *directions, "largest error, or why nothing was measured"),
        *((*line, *rates(found), remarks(list(found.values()))) for line, found in lines.items()),
    ]


def rate(row: dict[str, Any]) -> str:
    """Time, FLOP/s or bytes a second, their share of the most there is, and how many times as long as ours it takes."""
    if row["cost"] is None:
        return "in the noise" if row["status"] == "measured" else row["status"]
    share = "" if row["share"] is None else f" {row['share']:.0%}"
    ratio = "" if row["ratio"] is None else f" {figures(row['ratio'])}x"
    speed, unit = (row["flops"], "TFLOP/s") if row["flops"] else (row["bandwidth"], "TB/s")
    return f"{UNITS[row['unit']](row['cost'])} {figures(speed / 1e12)} {unit}{share}{ratio}"


def remarks(rows: Sequence[dict[str, Any]]) -> str:
    errors = [row["error"] for row in rows if row["error"] is not None]
    reasons = dict.fromkeys(row["message"] for row in rows if row["message"])  # each once
    return "; ".join([*([f"{max(errors):.1e}"] if errors else []), *reasons])


def describe_ceilings(ceilings: dict[str, Any]) -> str:
    if "matmul" not in ceilings:
        return f"not measured: {ceilings.get('error')}"
    products = ", ".join(f"{dtype} {figures(rate / 1e12)} TFLOP/s" for dtype, rate in ceilings["matmul"].items())
    return f"matrix product {products}; copy {figures(ceilings['copy'] / 1e9)} GB/s"


def aligned(rows: Sequence[dict[str, Any]], leading: Sequence[str] = TITLES[:3]) -> str:
    return in_columns(table(rows, leading))


def in_columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(results: dict[str, Any]) -> str:
    """The table, and under it where it comes from."""
    titles, *lines = table(results["rows"])
    lines = [titles, ("---",) * len(titles), *lines]
    text = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    machine, versions = results["machine"], results["versions"]
    gpu = ""
    if "ceilings" in results:
        gpu = f"{machine['device']}, driver {machine['driver']}; {describe_ceilings(results['ceilings'])}; "
    return (
        f"{text}\n\n`{results['command']}`, {results['date']}, {gpu}{machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load']}; {', '.join(f'{name} {number}' for name, number in versions.items())}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `python -m benchmarks` wrote")
    print(markdown(json.loads(parser.parse_args().results.read_text())))
