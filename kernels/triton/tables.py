"""How a function of the caller reads its arrays in a kernel, and whether it can be part of one."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from mqa_jax.inputs import Inputs
from mqa_jax.pair_function import PairFunction, derivative


class Table:
    """An array outside of the kernel, which can be read by brackets, with an integer for each axis, and not otherwise.

    As for arrays of JAX, a negative index counts from the end, and one outside the array means the nearest inside: a
    kernel reads no other memory, whatever a function computes for pairs that its mask hides.
    """

    def __init__(self, read: Callable[..., Array], shape: tuple[int, ...], dtype: DTypeLike):
        self._read, self.shape, self.ndim, self.dtype = read, shape, len(shape), dtype

    def __getitem__(self, index: Any) -> Array:
        index = index if isinstance(index, tuple) else (index,)
        if len(index) != self.ndim or not all(jnp.issubdtype(jnp.result_type(i), jnp.integer) for i in index):
            raise TypeError(f"an array {list(self.shape)} is read by one integer for each axis in brackets only")
        return self._read(*map(_inside, index, self.shape))


Function = Callable[..., Array]


def once_and_again(
    function: Function, references: tuple[Any, ...], read: Callable[..., Array]
) -> tuple[Function, Function]:
    """A function without its arrays, which are read by `read(reference, *index)`; and one that does not read again.

    The second, to be called after the first, takes for each read what the first has read: JAX can differentiate it.
    """
    kept: list[Array] = []

    def keep(*reference_and_index: Any) -> Array:
        kept.append(read(*reference_and_index))
        return kept[-1]

    def once(*pairs: Array) -> Array:
        kept.clear()
        return function(*pairs, *(_readable(x, keep) for x in references))

    def again(*pairs: Array) -> Array:
        left = iter(kept)
        return function(*pairs, *(_readable(x, lambda *_: next(left)) for x in references))

    return once, again


def _readable(reference: Any, read: Callable[..., Array]) -> Any:
    """A single number, or what is read by brackets."""
    if not reference.shape:
        return read(reference)
    return Table(functools.partial(read, reference), reference.shape, reference.dtype)


def _inside(index: Any, length: int) -> Array:
    index = jnp.asarray(index).astype(jnp.int32)
    return jnp.clip(jnp.where(index < 0, index + length, index), 0, length - 1)


def refusals(inputs: Inputs) -> Iterator[str]:
    """The reasons why the functions of these inputs cannot be part of a kernel."""
    score_fn, mask_fn = inputs.score_fn, inputs.mask.function
    if score_fn is not None:
        yield from _refusals("score_fn", score_fn.joined(inputs.operands.score_arrays))
    if mask_fn is not None:
        yield from _refusals("mask_fn", mask_fn)


def _refusals(name: str, function: PairFunction) -> Iterator[str]:
    empty = [x.shape for x in function.arrays if x.size == 0]
    if empty:
        yield f"a {name} of arrays that are not empty only (shapes={empty})"
    elif reason := _refusal(name, function.function, tuple((x.shape, x.dtype) for x in function.arrays)):
        yield f"a {name} of elementwise operations that reads arrays by integers in brackets only ({reason})"


@functools.lru_cache(maxsize=1024)
def _refusal(name: str, function: Callable, arrays: tuple) -> str | None:
    """Why a function cannot be part of a kernel, found by tracing it and its derivative on a tile."""
    struct = jax.ShapeDtypeStruct
    # The sum of its indices stands for an entry: like one, it belongs to the trace in which it is read.
    read = lambda array, *index: functools.reduce(jnp.add, index, jnp.int32(0)).astype(array.dtype)

    def in_tile(score: Array, *pairs: Array) -> Any:
        once, again = once_and_again(function, tuple(struct(*x) for x in arrays), read)
        if name == "mask_fn":
            return once(*pairs)
        return once(score, *pairs), derivative(lambda score: again(score, *pairs), score)

    pairs = [struct(shape, jnp.int32) for shape in ((), (), (16, 1), (1, 32))]
    try:
        traced = jax.make_jaxpr(in_tile)(struct((16, 32), jnp.float32), *pairs)
    except Exception as error:  # whatever the function of the caller raises on a Table
        return f"{type(error).__name__}: {error}"
    unknown = sorted(set(_primitives(traced.jaxpr)) - _known())
    return f"no rule for {', '.join(unknown)} in Pallas-Triton" if _known() and unknown else None


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from _primitives(getattr(inner, "jaxpr", inner))


@functools.cache
def _known() -> frozenset[str]:
    """What Pallas-Triton compiles. Private to JAX: where it is not found, lowering says what is missing."""
    try:
        from jax._src.pallas.triton.lowering import triton_lowering_rules
    except ImportError:
        return frozenset()
    return frozenset(str(primitive) for primitive in triton_lowering_rules)
