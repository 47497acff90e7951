"""Which tiles the mask does not hide entirely. Integers only: Python ints or traced int32 scalars.

Under every mask except the caller's boolean mask and the segments, a tile of queries [row_start, row_stop) needs one
contiguous range of keys, and a tile of keys one contiguous range of queries. Ranges are half open and may be empty
(start >= stop). Offsets and windows may use all 32 bits: before an offset is subtracted, it is clipped to within `rows`
of the minuend, so that the difference does not overflow.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array

from mqa_jax.masks import Mask, minus, plus
from mqa_jax.shapes import Length

Index = Length | Array


def key_range(mask: Mask, row_start: Index, row_stop: Index, columns: Length) -> tuple[Index, Index]:
    """Keys that some query of the tile may attend to. `mask` holds one batch row."""
    mask = _by_index(mask)
    offset = 0 if mask.query_offset is None else mask.query_offset[0]
    left, right = mask.reach
    start: Index = 0
    stop: Index = columns
    if left is not None:
        start = jnp.maximum(start, minus(offset + row_start, left))
    if right is not None:
        stop = jnp.minimum(stop - 1, plus(offset + (row_stop - 1), right)) + 1
    if mask.key_lengths is not None:
        stop = jnp.minimum(stop, mask.key_lengths[0])
    if mask.query_lengths is not None:
        stop = jnp.where(row_start < mask.query_lengths[0], stop, 0)
    return start, stop


def row_range(mask: Mask, column_start: Index, column_stop: Index, rows: Length) -> tuple[Index, Index]:
    """Queries that may attend to some key of the tile: the inverse of `key_range`."""
    mask = _by_index(mask)
    offset = 0 if mask.query_offset is None else mask.query_offset[0]
    left, right = mask.reach
    start: Index = 0
    stop: Index = rows
    if right is not None:
        first = minus(column_start, right)  # position
        start = first - jnp.clip(offset, minus(first, rows), first)
    if left is not None:
        last = plus(column_stop - 1, left)
        stop = last - jnp.maximum(offset, minus(last, rows - 1)) + 1
    if mask.query_lengths is not None:
        stop = jnp.minimum(stop, mask.query_lengths[0])
    if mask.key_lengths is not None:
        stop = jnp.where(column_start < mask.key_lengths[0], stop, 0)
    return start, stop


def full_key_range(mask: Mask, row_start: Index, row_stop: Index, columns: Length) -> tuple[Index, Index]:
    """Keys that every query of the tile may attend to, if no query is padding and the keys are not in a ring.

    From the first key of the last query to the last key of the first query: `key_range` with both ends exchanged.
    """
    return key_range(replace(mask, query_lengths=None), row_stop - 1, row_start + 1, columns)


def full_row_range(mask: Mask, column_start: Index, column_stop: Index, rows: Length) -> tuple[Index, Index]:
    """Queries that may attend to every key of the tile, if no key is padding or in a ring: as `full_key_range`."""
    return row_range(replace(mask, key_lengths=None), column_stop - 1, column_start + 1, rows)


def _by_index(mask: Mask) -> Mask:
    """A mask of indices: without causality and window in a ring, which is not in order and hardly exceeds a window."""
    return mask if mask.ring is None else replace(mask, is_causal=False, window=None)


def tile_range(start: Index, stop: Index, tile: Length, tiles: Length) -> tuple[Array, Array]:
    """Numbers of the tiles that overlap a range of positions: an empty range for an empty one."""
    first = jnp.clip(start // tile, 0, tiles)
    return first, jnp.where(start < stop, jnp.clip(-(-stop // tile), 0, tiles), first)
