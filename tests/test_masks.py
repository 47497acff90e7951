"""The meaning of every masking option: the grids of the docstring, and `jax.nn` where it has the option."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mqa_jax
from mqa_jax import masks
from mqa_jax.masks import Mask, Ring

INT = jnp.int32
offset = lambda n: jnp.array([n], INT)

# In the order in which they are drawn in the docstring of `mqa_jax.masks`, with T and S.
DRAWN = [
    (Mask(is_causal=True), 3, 5),
    (Mask(is_causal=True, query_offset=offset(2)), 3, 5),
    (Mask(is_causal=True), 5, 3),
    (Mask(is_causal=True, query_offset=offset(-2)), 5, 3),
    (Mask(window=(2, 1)), 5, 5),
    (Mask(window=(None, 1), query_offset=offset(1)), 3, 5),
    (Mask(query_lengths=offset(2), key_lengths=offset(3)), 3, 5),
    (Mask(query_segments=jnp.array([[0, 0, 1]]), key_segments=jnp.array([[0, 0, 1, 1, 1]])), 3, 5),
    (Mask(is_causal=True, query_offset=offset(4), ring=Ring(offset(6), 4)), 2, 4),
]


def _grids(docstring: str) -> list[np.ndarray]:
    """The 0/1 grids of a text; those side by side are separated by several spaces."""
    grids: list[list[list[int]]] = []
    open_grids: list[list[list[int]]] = []
    for line in docstring.splitlines():
        rows = re.findall(r"[01](?: [01])+", line) if re.fullmatch(r"[01 ]+", line.strip() or "-") else []
        if not rows:
            grids, open_grids = grids + open_grids, []
        for i, row in enumerate(rows):
            if i == len(open_grids):
                open_grids.append([])
            open_grids[i].append([int(digit) for digit in row.split()])
    return [np.array(grid, bool) for grid in grids + open_grids]


@pytest.mark.parametrize("number", range(len(DRAWN)))
def test_the_drawings_are_true(number):
    drawings = _grids(masks.__doc__)
    assert len(drawings) == len(DRAWN)
    mask, rows, columns = DRAWN[number]
    actual: Any = masks.visible(mask, jnp.arange(rows), jnp.arange(columns))
    np.testing.assert_array_equal(np.broadcast_to(actual, (1, 1, rows, columns))[0, 0], drawings[number])


def test_positions_in_a_ring():
    """Written token after token: what each slot holds is the last that was written there."""
    slots, held = 5, np.full(5, -1)
    for length in range(13):
        found = np.asarray(masks.key_positions(Mask(ring=Ring(offset(length), slots)), jnp.arange(slots, dtype=INT)))[0]
        np.testing.assert_array_equal(np.where(found < 0, -1, found), held)
        held[length % slots] = length


def test_no_option_removes_nothing():
    assert masks.visible(Mask(), jnp.arange(3), jnp.arange(5)) is None


def test_all_options_combine_by_and():
    rng = np.random.default_rng(0)
    segments = jnp.asarray(rng.integers(0, 2, (2, 7)), INT)
    parts: list[dict[str, Any]] = [
        dict(is_causal=True),
        dict(window=(3, 1)),
        dict(query_lengths=jnp.array([7, 5], INT)),
        dict(key_lengths=jnp.array([4, 7], INT)),
        dict(query_segments=segments, key_segments=segments),
        dict(allowed=jnp.asarray(rng.random((2, 3, 7, 7)) > 0.3)),
    ]
    rows = jnp.arange(7)
    every: list[Any] = [masks.visible(Mask(query_offset=offset(1), **part), rows, rows) for part in parts]
    whole = Mask(query_offset=offset(1), **{name: x for part in parts for name, x in part.items()})
    expected = np.logical_and.reduce([np.broadcast_to(x, (2, 3, 7, 7)) for x in every])
    np.testing.assert_array_equal(masks.visible(whole, rows, rows), expected)
    assert expected.any()


JAX_NN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(is_causal=True),
    "window, an int": dict(local_window_size=2),
    "window, a pair": dict(local_window_size=(3, 1)),
    "causal window": dict(is_causal=True, local_window_size=(2, 4)),
    "lengths": dict(query_seq_lengths=jnp.array([5, 7], INT), key_value_seq_lengths=jnp.array([7, 3], INT)),
    "mask": dict(mask=jnp.asarray(np.random.default_rng(1).random((2, 1, 7, 7)) > 0.2)),
    "bias": dict(bias=jnp.asarray(np.random.default_rng(2).standard_normal((1, 6, 7, 7)), jnp.float32)),
    "scale": dict(scale=0.7),
    "residual": dict(return_residual=True),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", JAX_NN)
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_a_drop_in_for_jax_nn(name, kv_heads, implementation):
    """Same names, order, layouts and meaning. Rows beyond a query length are 0 here, unspecified there."""
    options = dict(JAX_NN[name])
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, 7, heads, 16)), jnp.float32) for heads in (6, kv_heads, kv_heads)
    )
    arrays = query, key, value, options.pop("bias", None), options.pop("mask", None)
    expected = jax.nn.dot_product_attention(*arrays, **options)
    actual = mqa_jax.dot_product_attention(*arrays, **options, implementation=implementation)
    if "query_seq_lengths" in options:
        valid = (jnp.arange(7) < options["query_seq_lengths"][:, None])[..., None, None]
        expected = jnp.where(valid, expected, 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), actual, expected)


def test_one_batch_row_without_a_batch_axis():
    query = jnp.asarray(np.random.default_rng(0).standard_normal((7, 6, 16)), jnp.float32)
    alone = mqa_jax.dot_product_attention(query, query, query, is_causal=True)
    np.testing.assert_allclose(alone, jax.nn.dot_product_attention(query, query, query, is_causal=True), atol=2e-6)
