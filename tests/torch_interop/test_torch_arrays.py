"""Arrays between JAX and torch: one memory where both can, the same numbers everywhere."""

import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mqa_jax.torch_interop import arrays as torch_arrays
from mqa_jax.torch_interop import parity

pytestmark = pytest.mark.torch
DTYPES = ["float32", "bfloat16", "float16", "int32", "int8", "bool", "float8_e4m3fn"]


def tensor(dtype: str, *shape: int) -> Any:
    import torch

    torch.manual_seed(0)
    return (3 * torch.randn(*shape)).to(getattr(torch, dtype))


def numbers(x: Any) -> np.ndarray:
    """As float32, by each library itself."""
    return (
        np.asarray(jnp.asarray(x).astype(jnp.float32)) if isinstance(x, jax.Array | np.ndarray) else x.float().numpy()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_copy_on_the_cpu(dtype):
    theirs = tensor(dtype, 7, 5)
    ours = torch_arrays.to_jax(theirs)
    assert ours.dtype == dtype
    assert ours.unsafe_buffer_pointer() == theirs.data_ptr()
    np.testing.assert_array_equal(numbers(ours), numbers(theirs))
    made = jax.block_until_ready(ours + ours if dtype in ("float32", "bfloat16") else jnp.flip(ours))
    back = torch_arrays.to_tensor(made)
    assert back.dtype == theirs.dtype
    assert back.data_ptr() == made.unsafe_buffer_pointer()
    np.testing.assert_array_equal(numbers(back), numbers(made))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_has_to_be_copied(dtype):
    """Transposed, strided, not at a multiple of 64 bytes, empty, with a gradient; numpy's, read-only and transposed."""
    whole = tensor(dtype, 6, 10)
    for theirs in (whole.T, whole[:, ::2], whole.flatten()[1:], whole[:0], whole[0, 0], whole.requires_grad_()):
        ours = torch_arrays.to_jax(theirs)
        assert (ours.dtype, ours.shape) == (dtype, tuple(theirs.shape))
        np.testing.assert_array_equal(numbers(ours), numbers(theirs.detach()))
    x = np.arange(12.0).reshape(3, 4).astype(jnp.dtype(dtype))
    x.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of read-only memory
        for array in (x, x.T, x[:, 1], jnp.asarray(x).T, jnp.zeros((0, 3), dtype)):
            back = torch_arrays.to_tensor(array)
            assert tuple(back.shape) == array.shape
            np.testing.assert_array_equal(numbers(back), numbers(array))


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    compare: Any = parity.compare
    for wants in (lambda: torch_arrays.to_tensor(jnp.ones(2)), lambda: compare(None, {}, None, None)):
        with pytest.raises(ImportError, match=r"This needs PyTorch: pip install 'mqa-jax\[torch\]'"):
            wants()


def test_64_bits():
    theirs = tensor("float64", 3)
    with jax.enable_x64(True):
        assert torch_arrays.to_jax(theirs).dtype == "float64"
    assert torch_arrays.to_numpy(theirs).dtype == torch_arrays.to_tensor(theirs.numpy()).numpy().dtype == "float64"
