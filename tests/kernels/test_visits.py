"""No tile is visited in vain, and none without need in the loop with the mask: faults that no number shows."""

import functools
from dataclasses import replace

import covering
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_every_pair_of_options as pairs
from ways import WAYS

from mqa_jax import masks
from mqa_jax.inputs import Inputs, Operands, Sizes
from mqa_jax.kernels import tile_bounds
from mqa_jax.kernels.xla.decode import _BlockRange
from mqa_jax.kernels.xla.tile import TileShape, Tiling
from mqa_jax.masks import Mask


def contiguous(row: covering.Row) -> bool:
    """Whether each query sees keys that follow each other."""
    return not (row["mask"] or row["mask_fn"] or row["segments"] or row["ring"])


def hull(seen: np.ndarray, tile: int) -> list[tuple[int, int]]:
    """Of `[tiles, other]`: the first tile on the other axis that is seen, and the one after the last."""
    found = []
    for line in seen:
        index = np.flatnonzero(line) // tile
        found.append((int(index[0]), int(index[-1]) + 1) if index.size else (0, 0))
    return found


@functools.cache
def some_inputs() -> list[tuple[Inputs, tuple[int, int]]]:
    """And the tiles for them."""
    way = WAYS["xla"]
    rows = [row for row in filter(contiguous, way.table) if row["is_causal"] or row["window"] or row["query_lengths"]]
    ragged = [(Mask(window=(5, 0)), 83, 53, (8, 16)), (Mask(is_causal=True), 57, 83, (8, 4))]
    found = [(_tiling(mask, rows, columns).inputs, tile) for mask, rows, columns, tile in ragged]
    return [
        *found,
        *((pairs.masking(problem), way.tile(row["tiles"])) for row in rows[::2] for problem in way.problems(row)[:2]),
    ]


@pytest.mark.slow
def test_no_tile_is_visited_in_vain():
    """Where visible keys follow each other: from the first tile with one to the last, and none for padding alone."""
    both = lambda *arguments: (tile_bounds.key_tiles(*arguments), tile_bounds.row_tiles(*arguments))
    compiled = jax.jit(both, static_argnums=(1, 2, 3))  # here, as a mutant has to be traced anew
    for inputs, (rows, columns) in some_inputs():
        size = inputs.sizes
        of_rows, of_columns = map(np.asarray, compiled(inputs.mask, size, rows, columns))
        for batch in range(size.B):
            _check(inputs, batch, replace(inputs.mask, query_lengths=None), of_rows, rows, columns, False)
            _check(inputs, batch, replace(inputs.mask, key_lengths=None), of_columns, columns, rows, True)


def _check(inputs: Inputs, batch: int, mask: Mask, bounds: np.ndarray, own: int, other: int, transposed: bool) -> None:
    size = inputs.sizes
    visible = masks.visible(mask, jnp.arange(size.T), jnp.arange(size.S))
    seen = np.broadcast_to(True if visible is None else visible, (size.B, 1, size.T, size.S))[batch, 0]
    lengths = inputs.mask.query_lengths
    if transposed:
        seen, lengths = seen.T, inputs.mask.key_lengths
    length = seen.shape[0] if lengths is None else int(lengths[batch])
    starts = np.arange(0, seen.shape[0], own)
    tiles = np.stack([seen[start : start + own].any(0) & (start < length) for start in starts])
    found = bounds[batch if len(bounds) > 1 else 0][:, [0, 3]]
    for tile, (expected, (start, stop)) in enumerate(zip(hull(tiles, other), found, strict=True)):
        empty = expected[0] == expected[1] and start == stop
        assert empty or (start, stop) == expected, f"{tile=}: {start=}, {stop=}, {expected=}"


def test_tiles_of_queries_without_mask_beside_padded_keys():
    """That some keys of a tile are padding takes no mask: their gradients are cleared afterwards."""
    size = Sizes(B=1, T=32, S=32, N=1, K=1, G=1, H=8, V=8)
    table = np.asarray(tile_bounds.row_tiles(Mask(key_lengths=jnp.array([12], jnp.int32)), size, 8, 8))[0].tolist()
    assert table == [[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_tables_of_tiles_are_in_order():
    """Ids that nothing shares leave a hull of no tiles, and so do windows beyond the last key."""
    size = Sizes(B=1, T=32, S=32, N=1, K=1, G=1, H=8, V=8)
    ids = jnp.arange(32, dtype=jnp.int32)[None] // 8
    behind = Mask(window=(0, 0), query_offset=jnp.array([16], jnp.int32))
    for mask in (
        replace(behind, query_segments=ids, key_segments=ids),
        replace(behind, key_lengths=jnp.array([4], jnp.int32)),
    ):
        for start, full_start, full_stop, stop in np.asarray(tile_bounds.key_tiles(mask, size, 8, 8))[0]:
            assert start <= full_start <= full_stop <= stop


def test_ranges_of_tiles_are_in_order():
    """Of plain XLA, where the range of what is seen as a whole is empty."""
    for some, every in [((0, 4), (30, 4)), ((16, 40), (48, 20)), ((0, 48), (20, 10))]:
        (start, stop), (full_start, full_stop) = _tiling(Mask(), 48, 48)._ranges(some, every, 8, 6)
        assert start <= full_start <= full_stop <= stop


def test_tiles_of_several_heads_of_a_query():
    """Three heads of a query side by side in tiles of 16 rows, for every position of the first query."""
    size = Sizes(B=80, T=11, S=83, N=3, K=1, G=3, H=8, V=8)
    mask = Mask(query_offset=jnp.arange(-10, 70, dtype=jnp.int32), is_causal=True, window=(20, 0))
    bounds = np.asarray(tile_bounds.key_tiles(mask, size, 16, 8, group=3))
    visible = np.asarray(masks.visible(mask, jnp.arange(11), jnp.arange(83)))[:, 0].repeat(3, axis=1)
    for batch in range(size.B):
        for tile, (start, full_start, full_stop, stop) in enumerate(bounds[batch]):
            seen = visible[batch, tile * 16 : (tile + 1) * 16]
            assert not seen[:, : start * 8].any()
            assert not seen[:, stop * 8 :].any()
            assert seen[:, full_start * 8 : full_stop * 8].all()


def _tiling(mask: Mask, rows: int, columns: int) -> Tiling:
    query, key = jnp.zeros((1, rows, 1, 8)), jnp.zeros((1, columns, 1, 8))
    return Tiling(Inputs(Operands(query, key, key), mask), TileShape(8, 8, 1, upcast=True))


def test_one_loop_where_nothing_is_hidden():
    """Two cost time to compile; so they do where all is one tile."""
    assert _tiling(Mask(), 32, 24)._is_uniform
    assert _tiling(Mask(is_causal=True), 8, 8)._is_uniform


SOMETHING = {
    "queries": (Mask(), 33, 24),
    "keys": (Mask(), 32, 25),
    "causal": (Mask(is_causal=True), 32, 24),
    "window": (Mask(window=(9, 9)), 32, 24),
    "key lengths": (Mask(key_lengths=jnp.array([5])), 32, 24),
}


def test_two_loops_where_something_is_hidden():
    for hidden, (mask, rows, columns) in SOMETHING.items():
        assert not _tiling(mask, rows, columns)._is_uniform, hidden


def test_blocks_that_only_an_empty_row_would_see():
    """A row without keys does not make the others start at its window."""
    query, key = jnp.zeros((2, 1, 1, 8)), jnp.zeros((2, 500, 1, 8))
    lengths, offset = (jnp.array(x, jnp.int32) for x in ((400, 0), (399, 0)))
    mask = Mask(query_offset=offset, key_lengths=lengths, window=(64, 0))
    blocks = _BlockRange.seen(Inputs(Operands(query, key, key), mask), 64)
    assert (int(blocks.start), int(blocks.stop)) == (5, 7)
