"""Checks of `score_fn` and `mask_fn`: the function is called once on small abstract tiles of two kinds."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from mqa_jax.arguments import array, in_32_bits, shown
from mqa_jax.pair_function import PairFunction
from mqa_jax.shapes import positions

CALLED = {
    "score_fn": "(score, batch, head, query position, key position, *arrays)",
    "mask_fn": "(batch, head, query position, key position, *arrays)",
}
# Score, batch, head, query, key. A tile of one head, as in a GPU kernel, and several rows and heads.
TILES = (
    ((5, 7), (), (), (5, 1), (1, 7)),
    ((2, 3, 5, 7), (2, 1, 1, 1), (3, 1, 1), (2, 1, 5, 1), (1, 1, 1, 7)),
)


def checked_function(name: str, given: Any, batch: tuple, score_dtype: DTypeLike) -> PairFunction | None:
    """The function and its arrays, floating point ones in the dtype of the scores."""
    if given is None:
        return None
    function, *given_arrays = (given or (None,)) if isinstance(given, tuple | list) else (given,)
    if not callable(function) or not _is_hashable(function):
        raise ValueError(
            f"{name} must be a function {CALLED[name]}, hashable, or a tuple of one and the arrays that it reads: "
            f"{name}={shown(given)}. For example {name}=(function, table)."
        )
    arrays = tuple(_array(f"{name}[{i}]", x, score_dtype) for i, x in enumerate(given_arrays, 1))
    _check(name, function, jnp.dtype(score_dtype), tuple((x.shape, x.dtype) for x in arrays))
    numbers = positions(math.prod(batch))
    return PairFunction(numbers.reshape(batch), arrays, function)


def _is_hashable(function: Callable) -> bool:
    try:
        hash(function)
    except TypeError:
        return False
    return True


def _array(name: str, x: Any, score_dtype: DTypeLike) -> Array:
    x = x if hasattr(x, "dtype") else array(name, x)
    if jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits == 64:
        x = in_32_bits(name, x, "fit 32 bits", "as all integers in a tile do")
    x = array(name, x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x.astype(score_dtype)
    if not (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_):
        raise ValueError(f"{name} must hold floating point numbers, integers or bools: {name}={shown(x)}.")
    return x


@functools.lru_cache(maxsize=1024)
def _check(name: str, function: Callable, score_dtype: Any, arrays: tuple) -> None:
    called = f"{getattr(function, '__name__', function)!s}{CALLED[name]}"
    for score, *indices in TILES:
        struct = jax.ShapeDtypeStruct
        arguments = [struct(shape, jnp.int32) for shape in indices] + [struct(*x) for x in arrays]
        if name == "score_fn":
            arguments.insert(0, struct(score, score_dtype))
        traced = _traced(name, called, function, arguments)
        if traced.consts:
            raise ValueError(
                f"{name} reads arrays that it is not passed: {called} has {', '.join(map(_kind, traced.consts))}. "
                f"Pass them as {name}=(function, array, ...); a Python number may stay."
            )
        result = traced.out_avals[0]
        if name == "score_fn" and (result.shape, result.dtype) != (score, score_dtype):
            raise ValueError(
                f"score_fn must return scores of the shape and dtype that it is passed, elementwise: {called} returns "
                f"{shown(result)} for {score_dtype!s}{list(score)}. Cast with .astype(score.dtype); index no axis."
            )
        if name == "mask_fn" and (result.dtype != jnp.bool_ or not _broadcasts(result.shape, score)):
            raise ValueError(
                "mask_fn must return bools, True = may attend, that broadcast to the shape of its positions, "
                f"elementwise: {called} returns {shown(result)} for a tile {list(score)}. Compare numbers, combine by "
                "& and |."
            )


def _traced(name: str, called: str, function: Callable, arguments: list) -> Any:
    try:
        traced = jax.make_jaxpr(function)(*arguments)
    except Exception as error:  # whatever the function of the caller raises
        shapes = ", ".join(f"{x.dtype!s}{list(x.shape)}" for x in arguments)
        raise ValueError(
            f"{name} failed on a tile: {called}, called with {shapes}, raised {type(error).__name__}: {error}"
        ) from error
    if len(traced.out_avals) != 1:
        raise ValueError(f"{name} must return one array: {called} returns {len(traced.out_avals)}.")
    return traced


def _kind(x: Any) -> str:
    return ("a traced " if isinstance(x, jax.core.Tracer) else "") + f"{x.dtype!s}{list(x.shape)}"


def _broadcasts(shape: tuple, into: tuple) -> bool:
    return len(shape) <= len(into) and all(n in (1, whole) for n, whole in zip(shape[::-1], into[::-1]))
