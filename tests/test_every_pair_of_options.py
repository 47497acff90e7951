"""Every option alone and every pair of options, in several tiles of every implementation, against the reference.

Output, log-sum-exp and every gradient, for masks that end inside tiles, on their boundaries, at 0 and at the full
length. What the rows are made of is in `option_space`, how they become few in `covering`, the sizes in `ways`.
"""

import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import covering
import jax.numpy as jnp
import numpy as np
import option_space
import oracle
import pytest
from ways import WAYS, Way

import mqa_jax
from mqa_jax import masks
from mqa_jax.attention import inputs_of
from mqa_jax.batch_axes import map_arrays
from mqa_jax.inputs import Inputs
from mqa_jax.shapes import positions


def name(row: covering.Row) -> str:
    """What is given, for the names of tests."""
    given = {option: choice for option, choice in row.items() if choice not in (None, False)}
    return "-".join(option if choice is True else f"{option}={choice}" for option, choice in given.items())


def rows_of(way: Way) -> list[Any]:
    return [pytest.param(row, id=name(row)) for row in (*way.table, *way.table_in_8_bits)]


def judge(way: Way, row: covering.Row) -> None:
    way.judge(way.results(row), way.expected(row))


@pytest.mark.parametrize("row", rows_of(WAYS["xla"]))
def test_plain_xla(row):
    judge(WAYS["xla"], row)


@pytest.mark.parametrize("row", rows_of(WAYS["xla, few queries"]))
def test_plain_xla_of_few_queries(row):
    judge(WAYS["xla, few queries"], row)


@pytest.mark.parametrize("row", rows_of(WAYS["xla, tiles of CPUs"]))
def test_plain_xla_in_tiles_of_cpus(row):
    judge(WAYS["xla, tiles of CPUs"], row)


@pytest.mark.parametrize("row", rows_of(WAYS["xla, tiles of accelerators"]))
def test_plain_xla_in_tiles_of_accelerators(row):
    judge(WAYS["xla, tiles of accelerators"], row)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("row", rows_of(WAYS["triton"]))
def test_triton(request, row):
    judge(_on_this_machine(request, WAYS["triton"]), row)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("row", rows_of(WAYS["triton, few queries"]))
def test_triton_of_few_queries(request, row):
    judge(_on_this_machine(request, WAYS["triton, few queries"]), row)


def _on_this_machine(request, way: Way) -> Way:
    """Interpreted, or with --gpu compiled."""
    registered: Any = way.registered
    return replace(way, registered=functools.partial(registered, interpret=not request.config.getoption("--gpu")))


# -- the tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_every_choice_is_there_alone(way):
    choices, table = _choices(WAYS[way]), WAYS[way].table
    nothing = {option: chosen[0] for option, chosen in choices.items()}
    assert nothing in table
    for option, chosen in choices.items():
        assert all(nothing | {option: choice} in table for choice in chosen)


WITH_PAIRS = [name for name, way in WAYS.items() if way.pairs]


@pytest.mark.parametrize("way", WITH_PAIRS)
def test_every_pair_is_there(way):
    choices, table = _choices(WAYS[way]), WAYS[way].table
    there = set().union(*map(covering.pairs_of, table))
    absent = set(_pairs(choices)) - there
    assert absent == {(("key_lengths", True), ("ring", True))}


@pytest.mark.parametrize("way", WITH_PAIRS)
def test_every_pair_is_there_without_what_leads_past_the_unmasked_loop(way):
    """Apart from what the pair itself has of it."""
    leading = WAYS[way].leading_past
    there = set()
    for row in WAYS[way].table:
        given = {option for option in leading if row[option]}
        there |= {pair for pair in covering.pairs_of(row) if given <= set(dict(pair))}
    absent = set(_pairs(_choices(WAYS[way]))) - there
    assert absent == {(("key_lengths", True), ("ring", True))}


@pytest.mark.parametrize("way", WAYS)
def test_every_choice_is_there_in_8_bits(way):
    choices, table = _choices(WAYS[way]), WAYS[way].table_in_8_bits
    choices["tiles"] = WAYS[way].tiles_in_8_bits or choices["tiles"]
    there = {(row["bits"], option, row[option]) for row in table for option in choices}
    assert there == {
        (bits, o, c) for bits in ("int8", "float8_e4m3fn") for o, chosen in choices.items() for c in chosen
    }


def _choices(way: Way) -> covering.Choices:
    return way.options | way.leading_past | way.structure


def _pairs(choices: covering.Choices) -> Iterator[covering.Pair]:
    """Written out once more: what is proved here is not to rest on `covering`."""
    for one, other in itertools.combinations(sorted(choices), 2):
        yield from (((one, a), (other, b)) for a in choices[one] for b in choices[other])


@pytest.mark.slow
def test_the_options_are_all_there_are():
    """An argument of the function that is no choice of the table would be seen by nothing here."""
    arguments = set(inspect.signature(mqa_jax.dot_product_attention).parameters)
    given = set()
    for row in [*WAYS["xla"].table, *WAYS["xla"].table_in_8_bits]:
        problem = WAYS["xla"].problems(row)[0]
        given |= set(problem.arrays) | set(problem.options)
    assert arguments - given == {"implementation", "return_residual", "precision"}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_masks_leave_something_to_judge(way):
    """In each row of a table, over its value sets: a quarter of the queries see a key in one of them.

    And where nothing leads past the loop without mask, some tiles are seen as a whole and, if the mask hides anything,
    some in part.
    """
    for row in WAYS[way].table:
        seeing: list[float] = []
        whole = part = 0
        for problem in WAYS[way].problems(row):
            inputs, (rows, columns) = masking(problem), WAYS[way].tile(row["tiles"])
            size = inputs.sizes
            found = masks.visible(inputs.mask, positions(size.T), positions(size.S), positions(size.N))
            visible = np.broadcast_to(True if found is None else found, (size.B, size.N, size.T, size.S))
            seeing.append(float(visible.any(-1).mean()))
            cut = visible[..., : size.T // rows * rows, : size.S // columns * columns]
            tiles = cut.reshape(size.B, size.N, -1, rows, cut.shape[3] // columns, columns)
            some, every = tiles.any((3, 5)), tiles.all((3, 5))
            whole, part = whole + int(every.sum()), part + int((some & ~every).sum())
        assert max(seeing) > 0.25, f"{name(row)}: {seeing=}"
        if 2 * rows < size.T and not any(row[option] for option in option_space.LEADING_PAST):
            narrow = row["is_causal"] and row["window"] in ("both", "future")
            assert whole or narrow, f"{name(row)}: no tile is seen as a whole"
            hides = inputs.mask.hides_pairs or inputs.mask.key_lengths is not None
            assert part or not hides, f"{name(row)}: no tile is seen in part"


def masking(problem: oracle.Problem) -> Inputs:
    """With one batch axis."""
    query, key, value = (problem.arrays[name] for name in ("query", "key", "value"))
    options = {name: x for name, x in oracle.arguments({}, problem.options).items() if name != "bias"} | {
        "score_fn": None
    }
    mask = options.pop("mask", None)
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3]))
    flat = lambda x: x.reshape(-1, *x.shape[query.ndim - 3 :])
    return map_arrays(inputs_of(query, key, value, mask=mask, **options), flat, for_all_rows=lambda x: x)
