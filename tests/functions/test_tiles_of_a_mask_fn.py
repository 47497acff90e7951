"""Which tiles are computed of what a `mask_fn` shows."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import ways
from ready_made import READY, B, T, problem

from mqa_jax import masks
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import tile_bounds


def visits(of: oracle.Problem, backward: bool) -> int:
    """How many tiles of 8 x 16 plain XLA computes, counted when the program runs."""
    counted = []

    def counting(score, batch, head, query, key):
        jax.debug.callback(lambda: counted.append(1))
        return score

    with ways.small_tiles((8, 16, 2, True)) as implementation:
        options = of.options | {"score_fn": counting}
        run = oracle.results if backward else oracle.outputs
        jax.block_until_ready(run(replace(of, options=options), implementation))
    jax.effects_barrier()
    return len(counted)


@pytest.mark.parametrize("name", ["prefix", "documents", "sink and window", "dilated"])
def test_plain_xla_computes_the_tiles_in_which_something_is_seen(name):
    of = problem(READY[name], rows=64)
    seen = tiles_seen(of, 8, 16)
    assert visits(of, backward=False) == seen.any((3, 5)).any(1).sum() < B * 8 * 6 or name == "dilated"
    assert visits(of, backward=True) == 3 * seen.any((3, 5)).any(1).sum()


def tiles_seen(of: oracle.Problem, rows: int, columns: int) -> Any:
    """`[B, N, row tiles, rows, column tiles, columns]`, by the whole array."""
    inputs = inputs_of(**oracle.arguments(of.arrays, of.options))
    size = inputs.sizes
    found: Any = masks.visible(inputs.mask, *map(jnp.arange, (size.T, size.S, size.N)))
    visible = np.broadcast_to(found, (size.B, size.N, size.T, size.S))
    padded = np.pad(visible, [(0, 0), (0, 0), (0, -size.T % rows), (0, -size.S % columns)])
    return padded.reshape(size.B, size.N, padded.shape[2] // rows, rows, -1, columns)


def heads_differ(batch, head, query, key, lengths):
    return key < lengths[batch] + 16 * head


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("name", ["prefix", "documents", "sink and window", "tree", "heads"])
def test_bounds_of_a_function_are_the_hull_of_what_is_seen(name, group):
    heads = {"mask_fn": heads_differ, "mask_fn[1]": jnp.asarray([21, 0])}
    of = problem(READY.get(name, heads))
    rows, columns = 16, 8
    inputs = inputs_of(**oracle.arguments(of.arrays, of.options))
    seen = tiles_seen(of, rows // group, columns)
    some = seen.any((3, 5)).any(1)  # of any head
    of_batch = lambda bounds: np.broadcast_to(bounds, (B, *bounds.shape[1:]))
    bounds = of_batch(tile_bounds.key_tiles(inputs.mask, inputs.sizes, rows, columns, group))
    assert (bounds[..., 1] < bounds[..., 2]).any() == (name != "sink and window")
    for batch in range(B):
        assert [tuple(x) for x in bounds[batch, :, [0, 3]].T] == hull_of_tiles(some[batch])
        for row_tile, (_, start, stop, _) in enumerate(bounds[batch]):
            assert seen[batch, :, row_tile, : len_of(row_tile, rows // group, T), start:stop].all()
    if group == 1:
        bounds = of_batch(tile_bounds.row_tiles(inputs.mask, inputs.sizes, rows, columns))
        for batch in range(B):
            assert [tuple(x) for x in bounds[batch, :, [0, 3]].T] == hull_of_tiles(some[batch].T)


def test_what_the_last_query_alone_sees():
    """Two heads of three queries in a tile of 16 rows."""
    of_last = lambda batch, head, query, key: (key < 8) | (query == 2)
    query, key = jnp.zeros((1, 3, 2, 8)), jnp.zeros((1, 24, 1, 8))
    inputs = inputs_of(query, key, key, mask_fn=of_last)
    table = np.asarray(tile_bounds.key_tiles(inputs.mask, inputs.sizes, 16, 8, group=2))
    assert table.tolist() == [[[0, 0, 1, 3]]]


def len_of(tile: int, size: int, length: int) -> int:
    return min(size, length - tile * size)


def hull_of_tiles(some: np.ndarray) -> list[tuple[int, int]]:
    found = [np.flatnonzero(line) for line in some]
    return [(int(x[0]), int(x[-1]) + 1) if x.size else (0, 0) for x in found]
