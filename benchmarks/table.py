"""Results as tables: aligned on a terminal, and in Markdown, where `make plots` puts them.

results/README.md has a line for each case, between marks; results/DEVICE.md has a line for each peer.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
README = RESULTS / "README.md"


def figures(number: float) -> str:
    """Three of them, or all before the point."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}".removesuffix(".")


UNITS: dict[str, Callable[[float], str]] = {  # a cost in seconds, bytes, or seconds a token
    "ms": lambda seconds: f"{figures(1e3 * seconds)} ms",
    "MiB": lambda size: f"{figures(size / 2**20)} MiB",
    "tokens/s": lambda seconds: f"{figures(1 / seconds)} tokens/s",
}

Row = dict[str, Any]
COLUMNS: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["case"],
    "problem": lambda row: row["problem"],
    "direction": lambda row: row["direction"],
    "peer": lambda row: row["peer"],
    "measured": lambda row: cost(row),
    "ours is better by": lambda row: known(row["ratio"], lambda x: f"{figures(x)}x"),
    "TFLOP/s": lambda row: known(row["flops"], lambda x: figures(x / 1e12)),
    "of a product": lambda row: known(row["matmul_share"], lambda x: f"{x:.0%}"),
    "GB/s": lambda row: known(row["bandwidth"], lambda x: figures(x / 1e9)),
    "of a copy": lambda row: known(row["copy_share"], lambda x: f"{x:.0%}"),
    "temporaries": lambda row: known(row["temporaries"], UNITS["MiB"]),
    "compiled in": lambda row: known(row["compile_seconds"], lambda x: f"{x:.1f} s"),
    "largest error": lambda row: known(row["error"], lambda x: f"{x:.1e}"),
}


def known(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


def cost(row: Row) -> str:
    """What was not measured says why."""
    if row["cost"] is not None:
        return UNITS[row["unit"]](row["cost"])
    return "in the noise" if row["status"] == "measured" else f"{row['status']}: {row['message']}"


def table(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """Titles and lines."""
    return [tuple(COLUMNS), *(tuple(column(row) for column in COLUMNS.values()) for row in rows)]


def aligned(rows: Iterable[Row]) -> str:
    """Of those to which the case applies."""
    return in_columns(table(row for row in rows if row["status"] != "not applicable"))


def in_columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def describe_ceilings(ceilings: dict[str, Any]) -> str:
    if "matmul" not in ceilings:
        return f"not measured: {ceilings.get('error')}"
    products = ", ".join(f"{dtype} {figures(rate / 1e12)} TFLOP/s" for dtype, rate in ceilings["matmul"].items())
    return f"matrix product {products}; copy {figures(ceilings['copy'] / 1e9)} GB/s"


# -- Markdown ----------------------------------------------------------------------------------------------------------


def in_markdown(lines: Sequence[Sequence[str]]) -> str:
    titles, *others = lines
    escaped = lambda line: " | ".join(cell.replace("|", "\\|") for cell in line)
    return "\n".join(f"| {escaped(line)} |" for line in [titles, ["---"] * len(titles), *others])


def source(results: dict[str, Any]) -> str:
    """Where numbers come from."""
    machine, versions = results["machine"], results["versions"]
    return (
        f"`{results['command']}`, {results['date']}, JAX on {machine['device']}; {machine['cpu']}, {machine['cores']} "
        f"cores, load {machine['load']}; {describe_ceilings(results['ceilings'])}; "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}."
    )


def whole(results: dict[str, Any]) -> str:
    """A line for each peer; those to which a case does not apply are named under it."""
    others: dict[tuple[str, str], list[str]] = {}
    for row in results["rows"]:
        if row["status"] == "not applicable":
            others.setdefault((row["peer"], row["message"]), []).append(
                " ".join([row["case"], row["direction"]]).strip()
            )
    notes = [f"- {peer}: {message} ({', '.join(cases)})" for (peer, message), cases in others.items()]
    return "\n\n".join(
        [
            f"# Measured on {results['machine']['device']}",
            in_markdown(table(row for row in results["rows"] if row["status"] != "not applicable")),
            source(results),
            *(["Not applicable:", "\n".join(notes)] if notes else []),
            *memory(results),
        ]
    )


def memory(results: dict[str, Any]) -> list[str]:
    """Peak temporary memory on GPUs, as compiled without one."""
    found = results.get("gpu_memory")
    if found is None:
        return []
    if found["missing"]:
        return [f"Memory on GPUs is absent: {found['missing']}."]
    return ["Temporary memory at its peak, as XLA's compiler for these GPUs has it:", in_markdown(memory_table(found))]


def memory_table(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Titles, and a line for each case and peer, with MiB on each GPU or why there are none."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in found["rows"]:
        key = row["case"], f"{row['problem']} {row['direction']}", row["peer"]
        cells.setdefault(key, {})[row["gpu"]] = temporaries(row)
    gpus = list(dict.fromkeys(row["gpu"] for row in found["rows"]))
    lines = [(*key, *(sizes.get(gpu, "") for gpu in gpus)) for key, sizes in cells.items()]
    return [("case", "problem", "peer", *map(str.upper, gpus)), *lines]


def temporaries(row: Row) -> str:
    """What was not compiled says why."""
    size = row["temporaries"]
    return f"{row['status']}: {row['message']}" if size is None else UNITS["MiB"](size)


def aligned_memory(found: dict[str, Any]) -> str:
    return f"memory on GPUs: absent: {found['missing']}" if found["missing"] else in_columns(memory_table(found))


def compact(results: dict[str, Any]) -> str:
    """A line for each case: ours, and how many times as much each peer takes that was measured for some."""
    rows = results["rows"]
    peers = list(
        dict.fromkeys(row["peer"] for row in rows if row["status"] != "not applicable" and row["peer"] != "ours")
    )
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row["case"], row["problem"], row["direction"]), {})[row["peer"]] = row
    lines = [
        (*key, cost(found["ours"]), *(ratio(found[peer]) if peer in found else "" for peer in peers))
        for key, found in cases.items()
    ]
    return in_markdown([("case", "problem", "direction", "ours", *peers), *lines])


def ratio(row: Row) -> str:
    if row["status"] != "measured":
        return "" if row["status"] == "not applicable" else row["status"]
    return known(row["ratio"], lambda x: f"{figures(x)}x")


def losses(rows: Iterable[Row]) -> list[Row]:
    """Where a peer is faster, or takes less memory, than we."""
    return [row for row in rows if row["ratio"] is not None and row["ratio"] < 1]


def where_we_lose(results: dict[str, Any]) -> str:
    """A line for each peer, with all cases, the worst first. The README says why, below the mark."""
    found: dict[str, list[str]] = {}
    for row in sorted(losses(results["rows"]), key=lambda row: row["ratio"]):
        case = " ".join([row["case"], row["direction"]]).strip()
        found.setdefault(row["peer"], []).append(f"{case} {figures(row['ratio'])}x")
    lines = [f"- {peer}: {', '.join(cases)}" for peer, cases in found.items()]
    return "\n".join(lines) or "No peer was faster in any case."


def measured_section(results: dict[str, Any]) -> str:
    """What is between the marks of the README."""
    return "\n\n".join([compact(results), source(results), "## Where a peer is faster", where_we_lose(results)])


BEGIN, END = "<!-- from cpu.json: begin -->", "<!-- end -->"


def readme_with(results: dict[str, Any], text: str) -> str:
    before, rest = text.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{measured_section(results)}\n\n{END}{after}"


def write() -> list[Path]:
    """The README of the results, and the whole table of each device that has results."""
    files = []
    for file in result_files():
        files.append(file.with_suffix(".md"))
        files[-1].write_text(whole(json.loads(file.read_text())) + "\n")
    README.write_text(readme_with(json.loads((RESULTS / "cpu.json").read_text()), README.read_text()))
    return [*files, README]


def result_files() -> list[Path]:
    """Those of `python -m benchmarks`, one for each kind of device."""
    return [path for path in sorted(RESULTS.glob("*.json")) if "ceilings" in json.loads(path.read_text())]
