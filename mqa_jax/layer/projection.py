"""What a projection needs where mesh axes are `Explicit`, and the types of arrays say how they are cut.

A product that sums over a cut axis, such as that of heads with the kernel of `out`, is ambiguous to JAX until the type
of the result is given: tokens are cut as before, heads as the kernel has them, and features are whole.
"""

from typing import Any

import jax
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array


def dot_general(x: Array, kernel: Array, dimension_numbers: Any, precision: Any = None, **_: Any) -> Array:
    """`lax.dot_general` of tokens `[..., D]` with a kernel `[D, N, H]`, or of heads `[..., N, H]` with `[N, H, D]`."""
    ((contracted, _), _) = dimension_numbers
    sharding = None
    if _is_explicit(x):
        tokens = jax.typeof(x).sharding.spec[: x.ndim - len(contracted)]
        heads = jax.typeof(kernel).sharding.spec[len(contracted) : -1]
        sharding = _like(x, *tokens, *heads, None)
    return lax.dot_general(x, kernel, dimension_numbers, precision=precision, out_sharding=sharding)


def promote(*arrays: Any, dtype: Any = None) -> Any:
    """Flax's `promote_dtype` of x, kernel and bias; gathers a bias of features `[D]`, which are whole in the result."""
    x, kernel, bias = promote_dtype(*(arrays[0] if len(arrays) == 1 else arrays), dtype=dtype)  # NNX passes a tuple
    if bias is not None and bias.ndim == 1 and _is_explicit(x):
        bias = jax.sharding.reshard(bias, _like(x))
    return x, kernel, bias


def _is_explicit(x: Array) -> bool:
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def _like(x: Array, *spec: Any) -> NamedSharding:
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))
