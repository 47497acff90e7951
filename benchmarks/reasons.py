"""Why a peer is faster than we are, and what would fix it: one entry for each that the committed results have."""

from fnmatch import fnmatch
from typing import Any, NamedTuple


class Reason(NamedTuple):
    why: str
    fix: str


# (case, direction, peer), each a pattern of fnmatch; the first that fits is taken.
REASONS: dict[tuple[str, str, str], Reason] = {}


def reason_for(row: dict[str, Any]) -> Reason | None:
    names = (row["case"], row["direction"], row["peer"])
    fits = lambda patterns: all(fnmatch(name, pattern) for name, pattern in zip(names, patterns))
    return next((reason for patterns, reason in REASONS.items() if fits(patterns)), None)
