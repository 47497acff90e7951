"""Every fault of `mutants` is noticed by the table of all pairs of options, or by a test that counts tiles."""

import functools
import importlib

import covering
import emulated_mutants
import pytest
from mutants import MUTANTS, Mutant, applied
from ways import WAYS

ROWS = 3  # of a table, run at most for one mutant: the others would only take longer


def rows_for(mutant: Mutant) -> list[covering.Row]:
    """Rows in which all its options are given, those with the fewest others first."""
    way = WAYS[mutant.way]
    nothing = way.table[0]
    given = lambda row: {name for name, choice in row.items() if choice != nothing[name]}
    wanted = lambda row: all(_has(row, option) for option in mutant.given)
    return sorted(filter(wanted, way.table), key=lambda row: len(given(row)))[:ROWS]


def _has(row: covering.Row, option: str) -> bool:
    name, _, choice = option.partition("=")
    return str(row[name]) == choice if choice else bool(row[name])


@functools.cache
def expected(way: str, number: int):
    return WAYS[way].expected(WAYS[way].table[number])


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.function}: {mutant.old} -> {mutant.new}")
def test_every_mutant_is_noticed(mutant):
    with applied(mutant):
        assert is_noticed(mutant), "by no row of the table: a test is missing"


def test_every_mutant_changes_the_source():
    """All of them, whichever cases of the test above are chosen: what no function has any more proves nothing."""
    emulated = [Mutant(each.function, each.old, each.new, "") for each in emulated_mutants.MUTANTS]
    for mutant in (*MUTANTS, *emulated):
        with applied(mutant):
            pass


def is_noticed(mutant: Mutant) -> bool:
    if mutant.way not in WAYS:
        module, test = mutant.way.split(".")
        return _fails(getattr(importlib.import_module(module), test))
    way, rows = WAYS[mutant.way], rows_for(mutant)
    assert rows, "the table has no such row"
    return any(
        _fails(lambda row=row: way.judge(way.results(row), expected(mutant.way, way.table.index(row)))) for row in rows
    )


def _fails(test) -> bool:
    try:
        test()
    except AssertionError:
        return True
    return False
