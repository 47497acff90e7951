"""The order of tokens, by integers alone."""

import jax.numpy as jnp
import numpy as np
import pytest

import mqa_jax


def test_the_order_in_the_docstring():
    expected = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    np.testing.assert_array_equal(mqa_jax.zigzag_positions(12, 3), expected)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_zigzag_is_undone(devices, axis):
    length = 6 * devices
    shape = [2, 3, 5]
    shape[axis] = length
    x = jnp.arange(np.prod(shape)).reshape(shape)
    there = mqa_jax.zigzag(x, devices, axis)
    np.testing.assert_array_equal(there, jnp.take(x, mqa_jax.zigzag_positions(length, devices), axis))
    np.testing.assert_array_equal(mqa_jax.unzigzag(there, devices, axis), x)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_each_device_has_equal_work_under_a_causal_mask(devices):
    """Pairs of a query and a key that is not after it."""
    parts = np.asarray(mqa_jax.zigzag_positions(8 * devices, devices)).reshape(devices, -1)
    assert len({int(np.sum(part + 1)) for part in parts}) == 1


def test_positions_are_int32():
    assert mqa_jax.zigzag_positions(4, 2).dtype == jnp.int32
