"""Which tiles each program of a kernel visits, and which of them need no mask: tables that a kernel reads.

A tile of queries visits the key tiles [start, stop). Of these [full_start, full_stop) need no masking at all: the mask
hides no pair in them and they end inside the array. With 4 x 4 tiles and a causal window of two tiles:

    query tile 0    m . . .    start 0  full 0:0  stop 1          . never visited
    query tile 1    m m . .    start 0  full 0:0  stop 2          m visited with the mask
    query tile 2    m f m .    start 0  full 1:2  stop 3          f visited without it
    query tile 3    . m f m    start 1  full 2:3  stop 4

The same table with keys and queries exchanged is for the gradients of keys and values. Plain JAX computes the tables
before the kernel starts.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Integer

from mqa_jax.inputs import Sizes
from mqa_jax.kernels import tiles
from mqa_jax.masks import Mask, of_pairs
from mqa_jax.shapes import positions

Bounds = Int[Array, "#B tiles 4"]  # start, full_start, full_stop, stop
Related = tuple[Bool[Array, "#B X Y"], Bool[Array, "#B X Y"]]  # pairs of tiles: some pairs visible, and all


def key_tiles(mask: Mask, sizes: Sizes, rows: int, columns: int, group: int = 1) -> Bounds:
    """For each tile of queries, the tiles of keys.

    `group` neighbouring rows of a tile are heads of one query; `mask.query_segments` has an id for each row.
    """
    needs_mask = mask.allowed is not None or mask.ring is not None

    def of_tile(mask: Mask, tile: Array) -> tuple[tiles.Index, ...]:
        start, stop = tile * rows // group, jnp.minimum(-(-(tile + 1) * rows // group), sizes.T)
        some = tiles.key_range(mask, start, stop, sizes.S)
        every = (0, 0) if needs_mask else tiles.full_key_range(mask, start, stop, sizes.S)
        return *some, *every

    ranges = _for_each_tile(mask, of_tile, _tiles(sizes.T * group, rows))
    related = _related(mask.query_segments, mask.key_segments, rows, columns)
    of_function = _of_function(mask, sizes, rows, columns, group)
    return _bounds(ranges, columns, _tiles(sizes.S, columns), related, of_function)


def row_tiles(mask: Mask, sizes: Sizes, rows: int, columns: int) -> Bounds:
    """For each tile of keys, the tiles of queries. The kernel masks columns beyond the last key."""
    needs_mask = mask.allowed is not None or mask.ring is not None

    def of_tile(mask: Mask, tile: Array) -> tuple[tiles.Index, ...]:
        start, stop = tile * columns, jnp.minimum((tile + 1) * columns, sizes.S)
        some = tiles.row_range(mask, start, stop, sizes.T)
        every = (0, 0) if needs_mask else tiles.full_row_range(mask, start, stop, sizes.T)
        return *some, *every

    ranges = _for_each_tile(mask, of_tile, _tiles(sizes.S, columns))
    related = _related(mask.key_segments, mask.query_segments, columns, rows)
    of_function = _of_function(mask, sizes, rows, columns)
    turned = None if of_function is None else (of_function[0].swapaxes(1, 2), of_function[1].swapaxes(1, 2))
    return _bounds(ranges, rows, _tiles(sizes.T, rows), related, turned)


def _tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def _for_each_tile(mask, of_tile, count: int) -> tuple[Array, ...]:
    """`of_tile(mask of one batch row, number of the tile)` for all, each `[#B, count]`."""
    vectors = replace(mask, allowed=None, query_segments=None, key_segments=None, function=None)
    batch = max([x.shape[0] for x in jax.tree.leaves(vectors)], default=1)
    vectors = jax.tree.map(lambda x: jnp.broadcast_to(x, batch)[:, None], vectors)  # one entry for each mapped row
    for_one_row = jax.vmap(of_tile, in_axes=(None, 0), out_axes=0)
    for_batch = jax.vmap(for_one_row, in_axes=(0, None)) if jax.tree.leaves(vectors) else for_one_row
    found = for_batch(vectors, positions(count))
    return tuple(jnp.broadcast_to(x, (batch, count)) for x in found)


def _bounds(ranges: tuple[Array, ...], tile: int, count: int, *related: Related | None) -> Bounds:
    """From ranges of positions to ranges of tiles: rounded outwards for visited, inwards for unmasked tiles."""
    start, stop, full_start, full_stop = ranges
    start, stop = tiles.tile_range(start, stop, tile, count)
    full_start, full_stop = -(-full_start // tile), full_stop // tile
    for found in filter(None, related):
        some, every = _hull(found[0]), _first_run(found[1])
        start, stop = jnp.maximum(start, some[0]), jnp.minimum(stop, some[1])
        full_start, full_stop = jnp.maximum(full_start, every[0]), jnp.minimum(full_stop, every[1])
    stop = jnp.maximum(start, stop)
    full_start = jnp.clip(full_start, start, stop)
    full_stop = jnp.clip(full_stop, full_start, stop)
    return jnp.stack([start, full_start, full_stop, stop], axis=-1).astype(jnp.int32)


def _related(own, other, own_tile: int, other_tile: int) -> Related | None:
    """Which pairs of tiles may share a segment, because their id ranges overlap; and which hold only one, the same."""
    if own is None:
        return None
    own_low, own_high = (x[:, :, None] for x in _extremes(own, own_tile))
    other_low, other_high = (x[:, None, :] for x in _extremes(other, other_tile))
    some = (own_low <= other_high) & (other_low <= own_high)
    every = (own_low == own_high) & (other_low == other_high) & (own_low == other_low)
    return some, every


def _of_function(mask: Mask, sizes: Sizes, rows: int, columns: int, group: int = 1) -> Related | None:
    """Tiles of queries and of keys in which the mask's function hides not all pairs of all heads, and no pair.

    The pairs of a tile are the last axes, over which XLA sums while it computes them: `[T, S]` is never stored.
    """
    function = mask.function
    if function is None:
        return None
    row_tiles, column_tiles = _tiles(sizes.T * group, rows), _tiles(sizes.S, columns)
    tile = positions(row_tiles)[:, None]
    start, stop = tile * rows // group, jnp.minimum(-(-(tile + 1) * rows // group), sizes.T)
    queries = jnp.minimum(start + positions(-(-rows // group) + (group > 1)), stop - 1).reshape(-1)
    keys = jnp.minimum(positions(column_tiles * columns), sizes.S - 1)
    query, key = of_pairs(mask, queries, keys)  # [#B, 1, X * bq, 1], [#B, 1, 1, Y * bk]
    query = query.reshape(query.shape[0], row_tiles, 1, 1, -1, 1)
    key = key.reshape(key.shape[0], 1, column_tiles, 1, 1, columns)
    head = positions(sizes.N)[:, None, None]
    visible = function.function(function.batch.reshape(-1, 1, 1, 1, 1, 1), head, query, key, *function.arrays)
    visible = jnp.broadcast_to(visible, jnp.broadcast_shapes(jnp.shape(visible), (1, row_tiles, column_tiles, 1, 1, 1)))
    return jnp.any(visible, axis=(3, 4, 5)), jnp.all(visible, axis=(3, 4, 5))


def _extremes(segments: Integer[Array, "B X"], tile: int) -> tuple[Array, Array]:
    """Lowest and highest id in each tile."""
    padding = -segments.shape[1] % tile
    tiled = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge").reshape(segments.shape[0], -1, tile)
    return jnp.min(tiled, axis=-1), jnp.max(tiled, axis=-1)


def _hull(related: Bool[Array, "B X Y"]) -> tuple[Array, Array]:
    """The first related tile, and the one after the last; (0, 0) if there is none."""
    count = related.shape[-1]
    stop = jnp.where(jnp.any(related, axis=-1), count - _first(related[..., ::-1]), 0)
    return _first(related), stop


def _first_run(related: Bool[Array, "B X Y"]) -> tuple[Array, Array]:
    """The first contiguous run; the only one where ids are sorted."""
    start = _first(related)
    ended = ~related & (jnp.expand_dims(positions(related.shape[-1]), range(related.ndim - 1)) >= start[..., None])
    stop = jnp.where(jnp.any(ended, axis=-1), _first(ended), related.shape[-1])
    return start, jnp.where(jnp.any(related, axis=-1), stop, 0)


def _first(x: Bool[Array, "B X Y"]) -> Array:
    """The index of the first True, in 32 bits, also with `jax_enable_x64`."""
    return jnp.argmax(x, axis=-1).astype(jnp.int32)
