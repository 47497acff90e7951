"""Starts every Pallas-Triton kernel, and has the operations that differ between a GPU and interpret mode.

JAX 0.11 deprecates this backend in favour of Mosaic GPU. A port to it replaces the folder `kernels/triton`.
"""

import contextlib
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from mqa_jax.kernels.triton import lowering
from mqa_jax.kernels.triton.tile_config import TileConfig

LOG2_E = math.log2(math.e)

_launcher = jax.make_user_context(None)  # a function; part of jit's cache key


@contextlib.contextmanager
def launched_by(launcher: Callable[[str, Callable[..., Any], Any], Callable[..., Any]]) -> Iterator[None]:
    """Replaces each kernel by the function that `launcher(name, pallas_call, out)` returns: tests run them on CPUs."""
    with _launcher(launcher):
        yield


def kernel_call(
    name: str, kernel: Callable[..., None], grid: tuple[int, ...], config: TileConfig, out: Any, interpret: bool
) -> Callable[..., Any]:
    """Runs `kernel(*arguments, results)` for each point of the grid; both are trees of references to whole arrays.

    Args:
      name: of the kernel in profiles and compiled code.
      grid: the first axis is launched fastest.
      out: shapes and dtypes of the results, a tree.
    """

    def body(*references: Any) -> None:
        kernel(*references)

    body.__name__ = name  # Triton uses the name of the function and ignores `pallas_call(name=...)`
    parameters = lowering.quiet_parameters()(num_warps=config.warps, num_stages=config.stages)
    shapes = jax.tree.map(_without_varying_axes, out)
    launch = pallas.pallas_call(
        body, out_shape=shapes, grid=grid, compiler_params=parameters, interpret=interpret, name=name
    )
    run = launch if interpret else lambda *arguments: launch(*lowering.in_reach(name, arguments))
    return run if _launcher.value is None else _launcher.value(name, run, out)


def _without_varying_axes(x: Any) -> jax.ShapeDtypeStruct:
    """As all arrays of a kernel are (`kernels.devices`); inside of `jax.shard_map` Pallas asks for it."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.sharding.ManualAxisType())


def load(reference: Any, *index: Any, where: Any = None) -> Array:
    """Part of an array; 0 where `where` is False, without reading memory there. `index` holds numbers and spans."""
    part = reference.at[_traced(index)]
    if where is None:
        return triton.load(part)
    return triton.load(part, mask=where, other=jnp.zeros((), reference.dtype))


def store(reference: Any, value: Array, *index: Any, where: Any = None) -> None:
    """Writes part of an array, only where `where` is True."""
    triton.store(reference.at[_traced(index)], value.astype(reference.dtype), mask=where)


def _traced(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """Indices as int32 arrays: interpret mode has no rule for an index that is a Python number."""
    return tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)


def span(start: Any, size: int) -> Any:
    """`size` neighbouring entries, a power of two. Entries outside the array must be masked."""
    return pallas.ds(jnp.asarray(start, jnp.int32), size)


def program_id(axis: int) -> Array:
    return pallas.program_id(axis)


def divided(number: Any, by: Any) -> tuple[Array, Array]:
    """Quotient and remainder of numbers that are not negative: one instruction each, unlike // and %."""
    return lax.div(number, jnp.asarray(by, jnp.int32)), lax.rem(number, jnp.asarray(by, jnp.int32))


def exp2_of_line(x: Float[Array, "..."], slope: float, shift: Float[Array, "..."], interpret: bool) -> Array:
    """exp2(slope * x + shift); 0 where that is -inf.

    On a GPU these are two instructions: `jnp.exp2` adds three for denormal results, which are flushed to 0 here, and
    XLA's Triton does not fuse the multiplication with the addition. Interpret mode has no rule for inline assembly.
    """
    if interpret:
        return jnp.exp2(slope * x + shift)
    shape = jnp.broadcast_shapes(x.shape, shift.shape)
    hexadecimal = struct.pack(">f", slope).hex()
    (result,) = triton.elementwise_inline_asm(
        f"{{ .reg .f32 t; fma.rn.ftz.f32 t, $1, 0f{hexadecimal}, $2; ex2.approx.ftz.f32 $0, t; }}",
        args=[jnp.broadcast_to(x, shape), jnp.broadcast_to(shift, shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result


def settled(x: Float[Array, "..."], interpret: bool) -> Array:
    """x, which the compiler must compute before this point. It takes no time: `ptxas` removes the copy."""
    if interpret:
        return x
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (copy,) = triton.elementwise_inline_asm(
        "mov.b32 $0, $1;", args=[x], constraints="=f,f", pack=1, result_shape_dtypes=[shape]
    )
    return copy
