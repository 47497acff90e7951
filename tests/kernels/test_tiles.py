"""Ranges of tiles against brute force: exactly the keys, or queries, between the first and last that are visible."""

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from mqa_jax import masks
from mqa_jax.kernels import tiles
from mqa_jax.masks import Mask

pytestmark = pytest.mark.slow

scalars = lambda low, high: st.none() | st.integers(low, high).map(lambda n: jnp.array([n], jnp.int32))
SIZES = 9, 13


@st.composite
def contiguous_masks(draw):
    return Mask(
        query_offset=draw(scalars(-15, 15)),
        query_lengths=draw(scalars(0, SIZES[0])),
        key_lengths=draw(scalars(0, SIZES[1])),
        is_causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6))),
    )


def _grid(mask: Mask) -> np.ndarray:
    visible = masks.visible(mask, jnp.arange(SIZES[0]), jnp.arange(SIZES[1]))
    return np.ones(SIZES, bool) if visible is None else np.broadcast_to(visible, (1, 1, *SIZES))[0, 0]


def _covers(start, stop, seen, length: int) -> bool:
    """The range holds every index that is seen, and none further out than these."""
    inside = np.zeros(length, bool)
    inside[max(0, int(start)) : max(0, min(length, int(stop)))] = True
    return bool((inside | ~seen).all())


@hypothesis.given(contiguous_masks(), st.integers(0, SIZES[0] - 1), st.integers(1, 5))
@hypothesis.settings(max_examples=300)
def test_key_range(mask, row, rows):
    stop = min(SIZES[0], row + rows)
    found = tiles.key_range(mask, row, stop, SIZES[1])
    seen = _grid(mask)[row:stop].any(axis=0)
    assert _covers(*found, seen, SIZES[1])
    if mask.query_lengths is None and seen.any():  # padding among the rows of a tile may widen its range
        first, last = np.flatnonzero(seen)[[0, -1]]
        assert (max(0, int(found[0])), min(SIZES[1], int(found[1]))) == (first, last + 1)


@hypothesis.given(contiguous_masks(), st.integers(0, SIZES[1] - 1), st.integers(1, 5))
@hypothesis.settings(max_examples=300)
def test_row_range(mask, column, columns):
    stop = min(SIZES[1], column + columns)
    found = tiles.row_range(mask, column, stop, SIZES[0])
    seen = _grid(mask)[:, column:stop].any(axis=1)
    assert _covers(*found, seen, SIZES[0])
    if mask.key_lengths is None and seen.any():
        first, last = np.flatnonzero(seen)[[0, -1]]
        assert (max(0, int(found[0])), min(SIZES[0], int(found[1]))) == (first, last + 1)


@hypothesis.given(st.integers(-20, 40), st.integers(-20, 40), st.integers(1, 9), st.integers(1, 6))
def test_tile_range(start, stop, tile, count):
    first, last = map(int, tiles.tile_range(start, stop, tile, count))
    touched = [i for i in range(count) if max(start, i * tile) < min(stop, (i + 1) * tile)]
    assert list(range(first, last)) == touched
    assert 0 <= first <= last <= count
