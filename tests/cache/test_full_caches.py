"""Full caches, and arguments out of range where nothing can raise: an error, or NaN in that row alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import LENGTH, X, close, eager_step, full_pass, make, nearly_full, new_cache, step
from jax.experimental import checkify

import mqa_jax

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare


# -- a full cache ------------------------------------------------------------------------------------------------------


def test_overflow_raises_at_once_outside_jit():
    module, params, cache = nearly_full()
    with pytest.raises(ValueError, match=r"cache is full: cache_index=\[ 6 10  8\].*max_length=9"):
        eager_step(module, params, cache, X[:, :2])


def test_overflow_under_jit_is_nan_in_that_row_and_changes_no_other():
    module, params, cache = nearly_full()
    out, changed = step(module, params, cache, X[:, :2])
    assert jnp.isnan(out[1]).all()
    room = jax.tree.map(lambda x: x[:: len(x) - 1], cache)  # rows 0 and 2
    close(out[::2], step(module, params, room, X[::2, :2])[0])
    np.testing.assert_array_equal(changed["cached_key"][1], cache["cached_key"][1])
    out, _ = step(module, params, changed, X[:, :1])
    assert jnp.isnan(out[1]).all()  # and stays so, until the row is reset
    assert not jnp.isnan(out[0]).any()


def test_checkify_sees_an_overflow():
    module, params, cache = nearly_full()
    checked = jax.jit(checkify.checkify(functools.partial(eager_step, module)))
    error, _ = checked(params, cache, X[:, :2])
    assert "cache_index=10 after this call, max_length=9" in error.get()
    error, _ = checked(params, cache, X[:, :1])
    assert error.get() is None


def test_check_cache():
    module, params, cache = nearly_full()
    mqa_jax.check_cache({"layer": cache})
    _, full = step(module, params, cache, X[:, :2])
    with pytest.raises(ValueError, match="cache is full"):
        mqa_jax.check_cache({"layer": full})
    error, _ = jax.jit(checkify.checkify(mqa_jax.check_cache))({"layer": full})
    assert "max_length=9" in error.get()


# -- arguments out of range where nothing can raise --------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("wrong", [5, -1])
def test_impossible_seq_lengths_under_jit_are_nan_until_the_row_is_reset(layout, wrong):
    module, params = make(cache_layout=layout, local_window_size=(6, 0), rope=mqa_jax.Rope())
    cache = new_cache(module)
    out, cache = step(module, params, cache, X[:, :4], seq_lengths=jnp.array([4, wrong, 3]))
    following, cache = step(module, params, cache, X[:, 4:6])
    for x in (out, following):
        np.testing.assert_array_equal(jnp.isnan(x).all((1, 2)), [False, True, False])
        assert not jnp.isnan(x[::2]).any()
    close(following[0], full_pass(module, params, X[:, :6])[0, 4:])
    with pytest.raises(ValueError, match=r"worthless: cache_index=\[ 6 -1  5\]"):
        mqa_jax.check_cache({"layer": cache})
    cache = mqa_jax.reset_cache(cache, np.array([False, True, False]))
    close(step(module, params, cache, X[:, :4])[0][1], full_pass(module, params, X[:, :4])[1])
    checked = jax.jit(checkify.checkify(functools.partial(eager_step, module)))
    error, _ = checked(params, new_cache(module), X[:, :4], seq_lengths=jnp.array([4, wrong, 3]))
    assert f"seq_lengths={wrong}, tokens=4" in error.get()


def test_impossible_seq_lengths_without_a_cache_are_nan_under_jit():
    module, params = make()
    out = full_pass(module, params, X, seq_lengths=jnp.array([LENGTH, LENGTH + 1, 3]))
    np.testing.assert_array_equal(jnp.isnan(out).all((1, 2)), [False, True, False])
    assert not jnp.isnan(out[::2]).any()
    error, _ = jax.jit(checkify.checkify(lambda n: module.apply({"params": params}, X, seq_lengths=n)))(
        jnp.array([1, 2, LENGTH + 1])
    )
    assert f"seq_lengths={LENGTH + 1}, tokens={LENGTH}" in error.get()


def test_weights_of_a_full_row_are_nan():
    module, params, cache = nearly_full()
    attend = lambda cache: module.apply(
        {"params": params, "cache": cache}, X[:, :2], mutable=["cache"], needs_weights=True
    )
    weights = jax.jit(attend)(cache)[0][1]
    np.testing.assert_array_equal(jnp.isnan(weights).all((1, 2, 3)), [False, True, False])


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_row_from_outside_the_batch_is_nan_under_jit(dtype):
    module, params = make(cache_dtype=dtype)
    _, cache = step(module, params, new_cache(module), X[:, :4])
    reordered = jax.jit(mqa_jax.reorder_cache)(cache, jnp.array([2, 3, -1]))
    out, _ = step(module, params, reordered, X[jnp.array([2, 2, 2]), 4:5])
    np.testing.assert_array_equal(jnp.isnan(out).all((1, 2)), [False, True, True])
    close(out[0], step(module, params, cache, X[:, 4:5])[0][2])
    error, _ = jax.jit(checkify.checkify(mqa_jax.reorder_cache))(cache, jnp.array([2, 3, 1]))
    assert "rows of the cache, 0 to 2: rows=3" in error.get()
