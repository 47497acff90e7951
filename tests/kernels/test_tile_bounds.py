"""The tables of tiles against brute force: nothing visible is left out, nothing hidden is taken for visible."""

from dataclasses import replace

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mqa_jax import masks
from mqa_jax.inputs import Sizes
from mqa_jax.kernels import tile_bounds
from mqa_jax.masks import Mask, Ring

pytestmark = pytest.mark.slow

T, S, TILE = 37, 53, 8  # neither is a multiple of the tile
SIZES = Sizes(B=2, T=T, S=S, N=1, K=1, G=1, H=8, V=8)


@st.composite
def any_mask(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    maybe = lambda make: make() if draw(st.booleans()) else None
    integers = lambda low, high, *shape: jnp.asarray(rng.integers(low, high, shape), jnp.int32)
    ids = lambda length: integers(0, draw(st.sampled_from([2, 5])), 2, length)
    order = jnp.sort if draw(st.booleans()) else lambda x: x
    mask = Mask(
        query_offset=maybe(lambda: integers(-40, 40, draw(st.sampled_from([1, 2])))),
        query_lengths=maybe(lambda: integers(0, T + 1, 2)),
        key_lengths=maybe(lambda: integers(0, S + 1, 2)),
        is_causal=draw(st.booleans()),
        window=maybe(lambda: (int(rng.integers(0, 30)), int(rng.integers(0, 30)))),
    )
    if draw(st.booleans()):
        mask = replace(mask, query_segments=order(ids(T)), key_segments=order(ids(S)))
    if draw(st.booleans()):
        lengths = integers(0, 4 * S, 2)
        mask = replace(mask, ring=Ring(lengths, S), key_lengths=jnp.minimum(lengths, S), query_offset=lengths - T)
    return mask


def visible_in(mask: Mask) -> np.ndarray:
    """`[B, T, S]`"""
    visible = masks.visible(mask, jnp.arange(T), jnp.arange(S))
    return np.broadcast_to(True if visible is None else visible, (2, 1, T, S))[:, 0]


def check(bounds: np.ndarray, visible: np.ndarray, exists: np.ndarray) -> None:
    """`visible` and `exists`: `[B, own tiles, own, other]` and `[B, other]`; `bounds` over tiles of the other axis."""
    own_tiles, other = visible.shape[1], visible.shape[3]
    for batch in range(2):
        for tile in range(own_tiles):
            start, full_start, full_stop, stop = bounds[batch if len(bounds) > 1 else 0, tile]
            assert 0 <= start <= full_start <= full_stop <= stop <= -(-other // TILE)
            seen = visible[batch, tile].any(axis=0)
            assert not seen[: start * TILE].any(), "something visible before the first tile"
            assert not seen[stop * TILE :].any(), "something visible after the last tile"
            full = slice(full_start * TILE, full_stop * TILE)
            assert full.stop <= other or full_start == full_stop, "a tile without mask overhangs"
            assert (visible[batch, tile][:, full] | ~exists[batch, tile][:, None]).all(), "a tile without mask hides"


def in_tiles(x: np.ndarray, axis: int) -> np.ndarray:
    """Splits an axis into tiles; what is added to the last one is False."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % TILE)
    x = np.pad(x, padding)
    return x.reshape(*x.shape[:axis], -1, TILE, *x.shape[axis + 1 :])


@hypothesis.given(any_mask())
@hypothesis.settings(max_examples=60)
def test_key_tiles(mask):
    lengths = np.broadcast_to(T if mask.query_lengths is None else mask.query_lengths, 2)
    exists = in_tiles(np.arange(T) < lengths[:, None], axis=1)  # queries that are padding may see what they like
    check(np.asarray(tile_bounds.key_tiles(mask, SIZES, TILE, TILE)), in_tiles(visible_in(mask), 1), exists)


@hypothesis.given(any_mask())
@hypothesis.settings(max_examples=60)
def test_row_tiles(mask):
    lengths = np.broadcast_to(S if mask.key_lengths is None else mask.key_lengths, 2)
    exists = in_tiles(np.arange(S) < lengths[:, None], axis=1)
    visible = in_tiles(visible_in(mask).swapaxes(1, 2), 1)
    check(np.asarray(tile_bounds.row_tiles(mask, SIZES, TILE, TILE)), visible, exists)


def test_a_causal_window_visits_a_window():
    """As drawn at the top of `tile_bounds`: four tiles of 8, and a window of two."""
    size = replace(SIZES, T=32, S=32)
    mask = Mask(is_causal=True, window=(15, 0))
    table = np.asarray(tile_bounds.key_tiles(mask, size, 8, 8))[0].tolist()
    assert table == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]]


def test_packed_documents_visit_their_own_tiles():
    """Documents of 16 in tiles of 8: two tiles each, and none of them needs a mask."""
    size = replace(SIZES, B=1, T=48, S=48)
    ids = jnp.arange(48, dtype=jnp.int32)[None] // 16
    table = np.asarray(tile_bounds.key_tiles(Mask(query_segments=ids, key_segments=ids), size, 8, 8))[0].tolist()
    assert table == [[first, first, first + 2, first + 2] for first in (0, 0, 2, 2, 4, 4)]


def test_a_boolean_mask_leaves_no_tile_without_it():
    mask = Mask(allowed=jnp.ones((1, 1, T, S), bool))
    table = np.asarray(tile_bounds.key_tiles(mask, SIZES, TILE, TILE))
    assert (table[..., 1] == table[..., 2]).all()
