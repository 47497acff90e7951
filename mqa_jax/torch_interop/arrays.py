"""Arrays between JAX and PyTorch by DLPack: they share memory, without a copy, on devices that both can access.

They share memory on a CPU, and on a GPU that both can access. In all other cases the numbers are copied through numpy.
Dtypes stay the same, bfloat16 included; float64 and int64 need `jax_enable_x64` in JAX.

JAX assumes that its arrays never change. Do not write in place into a tensor that shares memory with a JAX array that
is still used; `tensor.clone()` has its own memory. (XLA copies arrays that do not start at a multiple of 64 bytes, such
as slices.)
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def to_jax(tensor: Any) -> Array:
    """A torch tensor as a JAX array of the same shape and dtype, detached; a strided one is made contiguous first.

    Raises:
      ValueError: JAX would narrow its dtype, such as float64 without `jax_enable_x64`.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"JAX would narrow this tensor: dtype={dtype!r}. Cast it, or jax.config.update('jax_enable_x64', True)."
        )
    tensor = tensor.detach().contiguous()
    if tensor.device.type == "cpu" or (tensor.device.type == "cuda" and jax.default_backend() == "gpu"):
        return jax.dlpack.from_dlpack(tensor)
    return jnp.asarray(to_numpy(tensor))


def to_tensor(array: Any) -> Any:
    """A JAX or numpy array as a torch tensor of the same shape and dtype, on the device where the array is."""
    torch = import_torch()
    if isinstance(array, jax.Array) and _torch_reaches(array):
        return torch.from_dlpack(array)
    x = np.asarray(array)
    x = x if x.flags.writeable and x.flags.c_contiguous else x.copy(order="C")  # torch has no read-only tensors
    if x.dtype == jnp.bfloat16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor as a numpy array, detached, without a copy if it is on the CPU."""
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # not a dtype of numpy
        return tensor.view(sys.modules["torch"].int16).numpy().view(jnp.dtype("bfloat16"))
    return tensor.numpy()


def is_tensor(x: Any) -> bool:
    """Whether x is a torch tensor; torch need not have been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def import_torch() -> Any:
    """The module torch, for functions that need more than the caller's tensors."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("This needs PyTorch: pip install 'mqa-jax[torch]'.") from error
    return torch


def _torch_reaches(array: Array) -> bool:
    platforms = [device.platform for device in array.devices()]  # DLPack does not support sharded arrays
    return platforms == ["cpu"] or (platforms == ["gpu"] and import_torch().cuda.is_available())
