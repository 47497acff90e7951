"""Tables in which every pair of choices occurs together in some row: a few dozen rows instead of thousands.

Faults of kernels depend on one option or on two that meet, rarely on three (Kuhn, Wallace and Gallo 2004, "Software
fault interactions"). With three options of two choices each, four rows hold all twelve pairs, and each choice alone:

    is_causal    window    bias
        0           0        0
        0           1        1
        1           0        1
        1           1        0
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

Choices = dict[str, tuple]  # for each option, what may be chosen; the first is "not given"
Row = dict[str, Any]  # one choice for each option
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(row: Row) -> set[Pair]:
    """All pairs of choices that occur together; options in alphabetical order."""
    return set(itertools.combinations(sorted(row.items()), 2))


def every_pair(choices: Choices, exist: Callable[[Row], bool]) -> list[Pair]:
    """All pairs that may occur together."""
    found = []
    for (one, ours), (other, theirs) in itertools.combinations(sorted(choices.items()), 2):
        found += [((one, a), (other, b)) for a in ours for b in theirs if exist({one: a, other: b})]
    return found


def table(choices: Choices, exist: Callable[[Row], bool], known: Iterable[Pair] = ()) -> list[Row]:
    """Rows that together hold every pair that `exist` allows and that is not `known`. Always the same ones.

    Greedy: a row starts with a pair that is missing; every other option is chosen so that as many missing pairs as
    possible join it, and is left out if that joins none.
    """
    already = set(known)
    missing = dict.fromkeys(pair for pair in every_pair(choices, exist) if pair not in already)
    rows = []
    while missing:
        row: Row = dict(next(iter(missing)))
        for option in [option for option in choices if option not in row]:
            possible = [choice for choice in choices[option] if exist(row | {option: choice})]
            joined = [
                sum(tuple(sorted([(option, choice), other])) in missing for other in row.items()) for choice in possible
            ]
            row[option] = possible[joined.index(max(joined))]
        for pair in pairs_of(row):
            missing.pop(pair, None)
        rows.append({option: row[option] for option in choices})
    return rows


def each_alone(choices: Choices) -> list[Row]:
    """A row with nothing given, and one for every choice on its own."""
    nothing = {option: chosen[0] for option, chosen in choices.items()}
    return [nothing, *(nothing | {option: c} for option, chosen in choices.items() for c in chosen[1:])]
