"""The matrix products of the kernels: in the dtype of the left side, with float32 sums, in the caller's precision."""

import functools
import operator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs
from mqa_jax.kernels.triton.io import Pieces
from mqa_jax.kernels.triton.precision import products_of


def product(inputs: Inputs, left: Array, right: Array) -> Float[Array, "rows columns"]:
    """Left @ right."""
    return _product(inputs, left, right, (1, 0))


def dot(inputs: Inputs, left: Pieces, right: Pieces) -> Float[Array, "rows columns"]:
    """Left @ right.T, summed over the pieces of the features."""
    return functools.reduce(operator.add, [_product(inputs, *both, (1, 1)) for both in zip(left, right)])


def _product(inputs: Inputs, left: Array, right: Array, summed: tuple[int, int]) -> Float[Array, "rows columns"]:
    """The product summed over these axes of the left and the right side."""
    numbers = ((summed[:1], summed[1:]), ((), ()))
    right = _widened(right, left.dtype)
    return lax.dot_general(left, right, numbers, precision=products_of(inputs), preferred_element_type=jnp.float32)


def _widened(x: Array, dtype: Any) -> Array:
    """Keys or values in the dtype of a product.

    From float8 to bfloat16 the compiler would convert through float16, and from there with one F2F for each number, on
    the unit that also computes the exponentials. Through float32 it is an addition, and one packing instruction for
    each two numbers.
    """
    if x.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        x = x.astype(jnp.float16).astype(jnp.float32)
    return x.astype(dtype)
