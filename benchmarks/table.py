"""Results as a table: aligned on a terminal, or in Markdown.

python -m benchmarks.table benchmarks/results/cpu.json
"""

import argparse
import json
from collections.abc import Callable, Iterable
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


def aligned(rows: Iterable[dict[str, Any]]) -> str:
    lines = [TITLES, *(cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(results: dict[str, Any]) -> str:
    """The table, and under it where it comes from."""
    lines = [TITLES, ("---",) * len(TITLES), *(cells(row) for row in results["rows"])]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    machine, versions = results["machine"], results["versions"]
    return (
        f"{table}\n\n`{results['command']}`, {results['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"load {machine['load']}; {', '.join(f'{name} {number}' for name, number in versions.items())}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what `python -m benchmarks` wrote")
    print(markdown(json.loads(parser.parse_args().results.read_text())))
