"""What is known to be wrong raises; what is only known on the device is told to `checkify`, which may not be there.

`jax.experimental.checkify.debug_check` is an effect of the program. An effect can be neither exported and serialised
nor scanned over by Flax, even where nobody asks for `checkify`. The check here is an identity on the numbers that it
judges: it has no effect, costs nothing, goes through every transformation, and `checkify` sees it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.checkify import error_checks  # how checkify treats each primitive; it has no public name
from jax.core import ShapedArray
from jax.experimental import checkify
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from mqa_jax.axes import alike

MAX_INT32 = 2**31 - 1

FULL = (
    "The cache is full: cache_index={value} after this call, max_length={high}. Make a longer cache with "
    "init_cache(batch, max_length), or reset these rows with reset_cache."
)
SPOILED = (
    "A row of the cache is worthless: cache_index={value}, where -1 says that seq_lengths or reorder_cache were given "
    "numbers out of range under jit. Reset it with reset_cache."
)
SHORT_COLUMNS = (
    "A mask or bias has a column for each position, up to the last one: positions={value} after this call, "
    "columns={high}. Make it longer; a ring buffer itself has no end."
)
SHORT_ROWS = (
    "A mask or bias with more rows than the call has tokens has one for each position, up to the last one: "
    "positions={value} after this call, rows={high}. Make it longer, or give the rows of this call alone."
)


def within(x: Int[ArrayLike, "*X"], low: int, high: int, message: str) -> tuple[Int[Array, "*X"], Bool[Array, "*X"]]:
    """`x` in 32 bits, and where it is not between `low` and `high` (both included).

    Concrete numbers that are not raise a `ValueError`; traced ones fail a check for `checkify`. The check belongs to
    the result, so that is what has to be used from there on.

    Args:
      message: with the fields `{value}`, and `{high}` if it likes.
    """
    checked: Array
    if isinstance(x, jax.core.Tracer):
        checked = _within_p.bind(x.astype(jnp.int32), low=low, high=high, message=message)
    else:
        values = np.asarray(x)  # before 32 bits cut anything off
        if np.any((values < low) | (values > high)):
            raise ValueError(message.format(value=values, high=high))
        checked = jnp.asarray(values, jnp.int32)
    return checked, (checked < low) | (checked > high)


def _checked(x: Int[Array, "*X"], low: int, high: int, message: str) -> Int[Array, "*X"]:
    lowest, highest = jnp.min(x, initial=MAX_INT32), jnp.max(x, initial=-MAX_INT32)
    value = jnp.where(lowest < low, lowest, highest)
    checkify.debug_check(
        (lowest >= low) & (highest <= high), message, value=value, high=jnp.int32(min(high, MAX_INT32))
    )
    return x


def _checkify_rule(*context_and_x, **params):
    """Hands what JAX passes to a rule (which depends on its version) and `x` to that of a function with the check."""
    (call,) = jax.make_jaxpr(jax.jit(functools.partial(_checked, **params)))(context_and_x[-1]).eqns
    error, (x,) = error_checks[call.primitive](*context_and_x, **call.params)
    return error, x


_within_p = Primitive("within")
_within_p.def_impl(lambda x, **_: x)
_within_p.def_abstract_eval(lambda aval, **_: aval)
mlir.register_lowering(_within_p, lambda context, x, **_: [x])
batching.defvectorized(_within_p)
error_checks[_within_p] = _checkify_rule


# -- what checkify has no rule for ------------------------------------------------------------------------------------


def unchecked(function: Callable[..., Array], *arguments: Array) -> Array:
    """`function(*arguments)`, into which `checkify` does not look: its rules for indices fail on those under `vmap`.

    Args:
      function: of a module, so that a program traced with it is found again. No index in it may leave an array. Its
        result has the type of the first argument, with the mesh axes that cut it.
    """
    return _unchecked_p.bind(*alike([*map(jnp.asarray, arguments)]), function=function)


def _type_of_result(first: ShapedArray, *_: ShapedArray, function: Callable[..., Array]) -> ShapedArray:
    return first.update(weak_type=False)


def _jvp(primals: Any, tangents: Any, function: Callable[..., Array]) -> tuple[Array, Array]:
    return jax.jvp(function, primals, tuple(map(ad.instantiate_zeros, tangents)))


def _mapped(arguments: Any, axes: Any, function: Callable[..., Array]) -> tuple[Array, int]:
    return jax.vmap(function, tuple(axes))(*arguments), 0


_unchecked_p = Primitive("unchecked")
_unchecked_p.def_impl(jax.jit(lambda *arguments, function: function(*arguments), static_argnames="function"))
_unchecked_p.def_abstract_eval(_type_of_result)
mlir.register_lowering(
    _unchecked_p, mlir.lower_fun(lambda *arguments, function: function(*arguments), multiple_results=False)
)
ad.primitive_jvps[_unchecked_p] = _jvp
batching.primitive_batchers[_unchecked_p] = _mapped
