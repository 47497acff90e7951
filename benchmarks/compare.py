"""Names what became slower, faster, missing or new between two results.

python -m benchmarks.compare OLD.json NEW.json
python -m benchmarks.compare OLD.json NEW.json --threshold 1.3

On one machine our costs are compared. On different ones they say nothing: there our lead over each peer is compared,
which is the peer's cost / ours. Other machines and other versions are warned of. It ends with status 1 if anything is
worse by more than the threshold, or was measured and is not any more.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.table import figures, in_columns

THRESHOLD = 1.15
Key = tuple[str, str, str, str]  # case, problem, direction, peer


class Change(NamedTuple):
    """Attributes: kind, of KINDS; factor, how many times worse it is, where both were measured."""

    kind: str
    key: Key
    factor: float | None
    message: str


KINDS = ("regression", "missing", "improvement", "new")  # the first two end with status 1


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Of the machines and versions."""
    return [
        f"{part} {name}: {old[part].get(name, 'absent')} -> {new[part].get(name, 'absent')}"
        for part in ("machine", "versions")
        for name in dict.fromkeys([*old[part], *new[part]])
        if name != "load" and old[part].get(name, "absent") != new[part].get(name, "absent")
    ]


def same_machine(old: dict[str, Any], new: dict[str, Any]) -> bool:
    return all(old["machine"][name] == new["machine"][name] for name in ("cpu", "cores", "device"))


def compare(old: dict[str, Any], new: dict[str, Any], threshold: float) -> list[Change]:
    """In the order of KINDS, the worst first."""
    by_cost = same_machine(old, new)
    before, after = (numbers(results, by_cost) for results in (old, new))
    changes = []
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key), after.get(key)
        if was is None and now is not None:
            changes.append(Change("new", key, None, ""))
        elif was is not None and now is None:
            changes.append(Change("missing", key, None, reason_of(new, key)))
        elif was is not None and now is not None:
            factor = now / was if by_cost else was / now
            if factor > threshold:
                changes.append(Change("regression", key, factor, ""))
            elif factor < 1 / threshold:
                changes.append(Change("improvement", key, factor, ""))
    return sorted(changes, key=lambda change: (KINDS.index(change.kind), -(change.factor or 0)))


def numbers(results: dict[str, Any], by_cost: bool) -> dict[Key, float | None]:
    """Our costs, or our leads over each peer; None for what was not measured. What does not apply is not there."""
    return {
        key_of(row): row["cost"] if by_cost else row["ratio"]
        for row in results["rows"]
        if (row["peer"] == "ours") == by_cost and row["status"] not in ("not applicable", "absent")
    }


def key_of(row: dict[str, Any]) -> Key:
    return row["case"], row["problem"], row["direction"], row["peer"]


def reason_of(results: dict[str, Any], key: Key) -> str:
    found = [row for row in results["rows"] if key_of(row) == key]
    return f"{found[0]['status']}: {found[0]['message']}" if found else "there is no such row"


def report(changes: Sequence[Change]) -> str:
    lines = [("what", "case", "problem", "direction", "peer", "worse by")]
    for change in changes:
        worse = change.message if change.factor is None else f"{figures(change.factor)}x"
        lines.append((change.kind, *change.key, worse))
    return in_columns(lines) if changes else "nothing changed by more than the threshold"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help=f"a factor above 1, by default {THRESHOLD}")
    options = parser.parse_args(arguments)
    if options.threshold <= 1:
        parser.error(f"--threshold must be above 1: threshold={options.threshold}. {THRESHOLD} ignores most noise.")
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    for text in differences(old, new):
        print(f"warning: {text}")
    print(f"compared: {'our costs' if same_machine(old, new) else 'our leads over peers, as the machines differ'}")
    changes = compare(old, new, options.threshold)
    print(report(changes))
    return int(any(change.kind in KINDS[:2] for change in changes))


if __name__ == "__main__":
    sys.exit(main())
