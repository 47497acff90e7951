"""Checks of single arguments: arrays, integers that must fit 32 bits, numbers, flags."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from mqa_jax.masks import MAX_INT32, MIN_INT32
from mqa_jax.shapes import Length

STATIC = "known when the call is traced (under jax.jit, one of the static_argnames)"


def array(name: str, x: ArrayLike) -> Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{name} must be an array of numbers: {name}={shown(x)}. Make one with jnp.asarray(x, dtype)."
        ) from error


def shown(x: Any) -> str:
    """The value and its type; for an array, its dtype and shape."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype!s}{list(x.shape)}"
    return f"{x!r:.80} ({type(x).__name__})"


def integers(name: str, x: ArrayLike, *shapes: tuple[int, ...]) -> Array | np.ndarray:
    """Integers of any dtype. numpy arrays stay numpy arrays: JAX would narrow them to 32 bits."""
    try:
        numbers = x if isinstance(x, jax.Array) else np.asarray(x)
    except (TypeError, ValueError):  # traced numbers in a list
        numbers = array(name, x)
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise ValueError(
            f"{name} must hold integers of at most 64 bits: {name}.dtype={numbers.dtype!s}. Cast it with .astype(int)."
        )
    if numbers.shape not in shapes:
        expected = " or ".join(str(shape) for shape in dict.fromkeys(shapes))
        raise ValueError(f"{name} has the wrong shape: {name}.shape={numbers.shape}, expected {expected}.")
    return numbers


def may_exceed_32_bits(x: Array | np.ndarray) -> bool:
    return jnp.iinfo(x.dtype).max > MAX_INT32


def in_32_bits(
    name: str, x: Array | np.ndarray, rule: str, remedy: str, lowest: int = MIN_INT32, highest: Length = MAX_INT32
) -> Array:
    """int32 from `lowest` to `highest`. Others are errors; they are clipped where they or `highest` are unknown."""
    kind = jnp.iinfo(x.dtype)
    if not isinstance(highest, int):
        return jnp.clip(jnp.asarray(x), lowest, jnp.asarray(highest).astype(x.dtype)).astype(jnp.int32)
    if not isinstance(x, jax.core.Tracer) and (kind.min < lowest or kind.max > highest):
        values = np.asarray(x)
        if np.any((values < lowest) | (values > highest)):
            raise ValueError(f"{name} must {rule}: {name}={values}, {remedy}.")
    elif isinstance(x, jax.core.Tracer):
        x = jnp.minimum(x, highest) if kind.max > highest else x
        x = jnp.maximum(x, lowest) if kind.min < lowest else x
    return jnp.asarray(x.astype(jnp.int32))


def whole_number(x: Any) -> int | None:
    """An integer of any type as an int; None for anything else, including bools and traced integers."""
    try:
        return None if _has_bools(x) or isinstance(x, bool) else operator.index(x)
    except TypeError:
        return None


def number(name: str, x: Any, remedy: str) -> float:
    """A number that is known when the call is traced."""
    try:
        if np.ndim(x) == 0 and math.isfinite(x):
            return float(x)
    except (TypeError, OverflowError):
        pass
    raise ValueError(f"{name} must be a finite number, {STATIC}: {name}={shown(x)}. {remedy}")


def flag(name: str, x: Any) -> bool:
    """A bool that is known when the call is traced; 0 and 1 are accepted."""
    is_scalar = _has_bools(x) and x.ndim == 0 and not isinstance(x, jax.core.Tracer)
    if not is_scalar and not (isinstance(x, int) and x in (0, 1)):
        raise ValueError(f"{name} must be True or False, {STATIC}: {name}={shown(x)}.")
    return bool(x)


def _has_bools(x: Any) -> bool:
    return getattr(x, "dtype", None) == jnp.bool_


def of_batch(x: Any, batch: tuple, axes: int) -> Any:
    """One sequence `[T, N, H]` may come with other arrays that are a batch of one, `[1, S, K, H]`, as in `jax.nn`.

    `axes`: the number of axes that follow the batch axes.
    """
    if isinstance(x, list | tuple):
        return of_batch(x[0], batch, axes) if not batch and len(x) == 1 and _depth(x) == axes + 1 else x
    if batch or not hasattr(x, "shape") or len(x.shape) != axes + 1 or x.shape[0] != 1:
        return x
    return x.reshape(x.shape[1:])  # a numpy array by numpy: JAX would narrow 64 bits to 32


def _depth(x: Any) -> int:
    return 1 + _depth(x[0]) if isinstance(x, list | tuple) and x else np.ndim(x)
