"""Positions, windows and lengths at the ends of 32 bits, where sums wrap that nobody looks at.

What is visible is worked out in numpy, in 64 bits, and given to the reference as a boolean mask; distances as a bias.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from forced_tiles import SMALL, tiled, use_tiles

import mqa_jax
from mqa_jax.kernels import tiles
from mqa_jax.kernels.xla.tile import TileShape
from mqa_jax.mask_checks import checked_window
from mqa_jax.masks import MAX_INT32, MIN_INT32, Mask

COLUMNS = 21
IMPLEMENTATIONS = [("reference", 19), ("xla", 5), ("tiled", 19), ("kernels", 5), ("kernels", 19)]  # and T

WINDOWS: dict[str, tuple[Any, bool]] = {  # and whether a causal mask is beside them
    "causal": (-1, True),
    "causal, as flash-attn says it": ((-1, 0), False),
    "the future": ((0, 2**31 - 1), False),
    "nearly no limit": (2**31 - 2, False),
    "far to the left": ((2**31 - 3, 2), True),
    "far to the right": ((1, 2**31 - 12), False),
}


def exact(offset, window, is_causal: bool, rows: int, keys=None) -> tuple[np.ndarray, np.ndarray]:
    """What is visible, and how far apart: `[B, T, S]`, in 64 bits."""
    query = (np.asarray(offset, np.int64)[:, None] + np.arange(rows))[:, :, None]
    key = np.arange(COLUMNS)[None, None] if keys is None else keys[:, None]
    sides = window if isinstance(window, tuple) else (window, window)
    left, right = (2**40 if n == -1 or n >= 2**31 - 1 else int(n) for n in sides)
    visible = (key >= query - left) & (key <= query + right)
    return visible & (key <= query) if is_causal else visible, np.abs(key - query)


def problem(batch: int, rows: int, **options: Any) -> oracle.Problem:
    sizes: Any = dict(batch=(batch,), rows=rows, columns=COLUMNS, heads=4, kv_heads=2, features=8)
    sinks = jnp.asarray([0.5, -1.0, 0.0, 2.0])
    return oracle.random_problem(np.random.default_rng(0), **sizes, sinks=sinks, **options)


def judge(monkeypatch, implementation: str, rows: int, visible, distance, slopes, **options: Any) -> None:
    """Output, log-sum-exp and every gradient, with the same numbers said in another way to the reference."""
    ours = problem(len(visible), rows, alibi_slopes=slopes, **options)
    bias = -np.asarray(slopes)[:, None, None] * distance[:, None].astype(np.float32)
    theirs = problem(len(visible), rows, bias=jnp.asarray(bias, jnp.float32), mask=jnp.asarray(visible)[:, None])
    use_tiles(monkeypatch, **SMALL)
    tiled(monkeypatch, TileShape(rows=7, columns=8, heads=1, upcast=True))
    actual, expected = oracle.results(ours, implementation), oracle.results(theirs, "reference")
    d_bias = np.float64(expected.pop("d_bias"))
    expected["d_alibi_slopes"] = np.float32(-np.sum(d_bias * distance[:, None], axis=(0, 2, 3)))
    oracle.judge_float32(actual, expected)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(("implementation", "rows"), IMPLEMENTATIONS)
def test_windows_and_offsets(monkeypatch, implementation, rows, name):
    window, is_causal = WINDOWS[name]
    offset = np.array([2**31 - rows, 2**31 - rows - 9, 3, 0, -7, -(2**31) + 11, -(2**31)])
    visible, distance = exact(offset, window, is_causal, rows)
    options: Any = dict(query_offset=jnp.asarray(offset, jnp.int32), local_window_size=window)
    slopes = jnp.asarray([0.0, 1.0, 2.0, -1.0]) * 2**-31
    judge(monkeypatch, implementation, rows, visible, distance, slopes, is_causal=is_causal, **options)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("window", [None, (3, 0), (2**31 - 2, 0), (0, 2**31 - 2)])
@pytest.mark.parametrize(("implementation", "rows"), IMPLEMENTATIONS)
def test_rings(monkeypatch, implementation, rows, window):
    """Through which as many tokens went as can be counted; and queries beside them that are nearly as far away."""
    lengths = np.array([2**31 - 1, 2**31 - 8, 2**31 - 1, 40])
    offset = np.array([2**31 - 1 - rows, 2**31 - 8 - rows, -(2**31), -(2**31) + 45])
    slots = np.arange(COLUMNS)
    newest = lengths[:, None] - 1
    keys = newest - (newest - slots) % COLUMNS
    visible, distance = exact(offset, -1 if window is None else window, False, rows, keys)
    options: Any = dict(
        query_offset=jnp.asarray(offset, jnp.int32),
        key_value_ring_lengths=jnp.asarray(lengths, jnp.int32),
        local_window_size=window,
    )
    slopes = jnp.asarray([0.0, 1.0, 0.5, -1.0]) * 2**-32
    judge(monkeypatch, implementation, rows, visible, distance, slopes, **options)


# -- what the checker makes of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2**31 - 1, 2**31, 2**40, 10**30, -1, np.int64(2**40), np.uint32(2**32 - 1)])
def test_windows_without_limit(number):
    """However somebody says it: what two positions can be apart at most, or -1."""
    assert checked_window(number) is None
    assert checked_window((number, number)) is None
    assert checked_window((number, 0)) == (None, 0)
    assert checked_window((3, number)) == (3, None)


@pytest.mark.parametrize("number", [3, 0, 2**31 - 2])
def test_windows_of_any_type_of_integer(number):
    kinds: Any = (int, np.int32, np.int64, np.uint32, np.array, jnp.int32)
    for kind in kinds:
        assert checked_window((kind(number), 1)) == (number, 1)
        assert checked_window(kind(number)) == (number, number)


KINDS: dict[str, Any] = {  # of which JAX knows some in 64-bit mode only
    "Python": list,
    "numpy's own": np.asarray,
    "narrow": functools.partial(np.asarray, dtype=np.int8),
    "unsigned": functools.partial(np.asarray, dtype=np.uint64),
    "JAX": jnp.asarray,
}


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_any_type(kind):
    """Given as numbers, and traced."""
    ids = [[0] * 3 + [1] * 2, [5] * 5], [[0] * 4 + [1] * 3, [5] * 6 + [4]]
    numbers: dict[str, Any] = dict(
        query_offset=[2, 0],
        query_seq_lengths=[5, 4],
        key_value_seq_lengths=[6, 7],
        query_segment_ids=ids[0],
        key_value_segment_ids=ids[1],
    )
    attend: Any = functools.partial(mqa_jax.dot_product_attention, *(jnp.ones((2, n, 2, 4)) * n for n in (5, 7, 7)))
    causal: Any = dict(is_causal=True, return_residual=True)
    expected = attend(**{name: jnp.asarray(x, jnp.int32) for name, x in numbers.items()}, **causal)
    given = {name: KINDS[kind](x) for name, x in numbers.items()}
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(attend(**given, **causal), expected)
    for is_wide in (False, True):
        with jax.enable_x64(is_wide):
            arrays = {name: jnp.asarray(x) for name, x in given.items()}
            same(jax.jit(lambda arrays: attend(**arrays, **causal))(arrays), expected)


@pytest.mark.parametrize("dtype", ["int64", "uint32", "uint64"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "kernels"])
@pytest.mark.usefixtures("kernels")
def test_traced_integers_beyond_32_bits(implementation, dtype):
    """Lengths and offsets are the nearer end of their range; ids are compared in all their bits."""
    query, key = (jnp.asarray(np.random.default_rng(0).standard_normal((2, n, 2, 4)), jnp.float32) for n in (5, 7))
    attend: Any = functools.partial(mqa_jax.dot_product_attention, query, key, key, is_causal=True)
    beyond, ids = 2**31 + 5, np.array([[0] * 4 + [1] * 3, [5] * 6 + [4]])
    options: Any = dict(query_seq_lengths=[beyond, 4], key_value_seq_lengths=[7, beyond], query_offset=[beyond, 1])
    segments: Any = dict(query_segment_ids=ids[:, 1:6], key_value_segment_ids=ids)
    expected = attend(
        query_seq_lengths=jnp.array([5, 4], jnp.int32),
        query_offset=jnp.array([2**31 - 5, 1], jnp.int32),
        **{name: jnp.asarray(x, jnp.int32) for name, x in segments.items()},
        implementation="reference",
    )
    far = 2**31 if dtype == "uint32" else 2**32  # ids apart by so much are equal in 32 bits, or of another sign
    options |= {name: np.where(x > 0, x - 1 + far, 0) for name, x in segments.items()}
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, dtype)) for name, x in options.items()}
        assert {x.dtype.name for x in wide.values()} == {dtype}
        found = jax.jit(lambda wide: attend(**wide, implementation=implementation))(wide)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# -- tiles ------------------------------------------------------------------------------------------------------------


OFFSETS = (MAX_INT32 + 1 - 19, MAX_INT32 - 30, 4, 0, -3, MIN_INT32 + 9, MIN_INT32)
LIMITS = (None, 0, MAX_INT32 - 18, MAX_INT32 - 1)
TILES = ((0, 4), (6, 7), (15, 19))  # first and last + 1


@pytest.mark.parametrize("is_causal", [False, True])
def test_ranges_of_tiles(is_causal):
    """Against brute force: both ends of both axes, of what some of a tile see and of what all do."""
    rows, offsets = 19, jnp.asarray(OFFSETS, jnp.int32)
    starts, stops = jnp.asarray(TILES, jnp.int32).T
    for window in itertools.product(LIMITS, LIMITS):

        def found(offset, start, stop, window=window):
            mask = Mask(query_offset=offset[None], window=window, is_causal=is_causal)
            keys = [f(mask, start, stop, COLUMNS) for f in (tiles.key_range, tiles.full_key_range)]
            return keys, [f(mask, start, stop, rows) for f in (tiles.row_range, tiles.full_row_range)]

        for_each = jax.vmap(jax.vmap(found, in_axes=(None, 0, 0)), in_axes=(0, None, None))
        ranges = jax.tree.map(np.asarray, jax.jit(for_each)(offsets, starts, stops))
        sees, _ = exact(OFFSETS, tuple(-1 if n is None else n for n in window), is_causal, rows)
        for (number, visible), (tile, (start, stop)) in itertools.product(enumerate(sees), enumerate(TILES)):
            for seen, (some, every) in zip((visible[start:stop], visible[:, start:stop].T), ranges):
                index = np.arange(seen.shape[1])
                for (first, last), expected in ((some, seen.any(axis=0)), (every, seen.all(axis=0))):
                    inside = (index >= first[number, tile]) & (index < last[number, tile])
                    message = f"{window=}, offset={OFFSETS[number]}, tile={start}:{stop}"
                    np.testing.assert_array_equal(inside, expected, err_msg=message)
