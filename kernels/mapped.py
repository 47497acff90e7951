"""Rules for primitives whose parameter `maps` lists the axes that `jax.vmap` has added.

Each entry of `maps`, the innermost first, has 0 for every argument with a new leading axis and None for the others,
which are not copied. Every result has the axis. A rule is written for arguments without additional axes; what stands
here applies `jax.vmap` to it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Axes = tuple[int | None, ...]
Maps = tuple[Axes, ...]


def over(maps: Maps, function: Callable[..., list]) -> Callable[..., list]:
    """The function of arguments with these additional axes."""
    for axes in maps:
        function = jax.vmap(function, in_axes=axes)
    return function


def define(name: str, types: Callable[..., list], lowering: Callable[..., Any]) -> Primitive:
    """A primitive with several results, whose types without maps `types` gives."""
    primitive = Primitive(name)
    primitive.multiple_results = True

    def abstract(*arguments: Any, maps: Maps, **parameters: Any) -> list:
        outside: list[tuple[Any, Any]] = []  # size and mesh axes of each
        for axes in reversed(maps):
            mapped = [x for x, axis in zip(arguments, axes) if axis == 0]
            cuts = [x.sharding.spec[0] for x in mapped if x.sharding.spec[0] is not None]
            outside.append((mapped[0].shape[0], cuts[0] if cuts else None))
            arguments = tuple(x if axis is None else _without_axis(x) for x, axis in zip(arguments, axes))
        return [_with_axes(x, outside) for x in types(*arguments, **parameters)]

    primitive.def_impl(functools.partial(_run, primitive))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, lowering)
    return primitive


def _run(primitive: Primitive, *arguments: Any, **parameters: Any) -> list:
    """Outside of `jax.jit`, which `jax.disable_jit` does not disable here: it is all that can run a primitive."""
    with jax.disable_jit(False):
        return _program(primitive, **parameters)(*arguments)


@functools.lru_cache(maxsize=1024)
def _program(primitive: Primitive, **parameters: Any) -> Callable[..., list]:
    def run(*arguments: Any) -> list:
        return primitive.bind(*arguments, **parameters)

    run.__qualname__ = primitive.name
    run._apply_primitive = True  # type: ignore[attr-defined]  # for jax_debug_nans, which else runs it anew, endlessly
    return jax.jit(run)


def def_batching(primitive: Primitive, flat: Callable[..., list | None]) -> None:
    """`flat(arguments, axes, **parameters)` returns the results without a new entry in `maps`, or None if it cannot."""

    def rule(arguments: Sequence[Any], dims: Sequence[int | None], *, maps: Maps, **parameters: Any) -> tuple:
        arguments = [x if dim is None else jnp.moveaxis(x, dim, 0) for x, dim in zip(arguments, dims)]
        axes = tuple(None if dim is None else 0 for dim in dims)
        results = None if maps else flat(arguments, axes, **parameters)
        if results is None:
            results = primitive.bind(*arguments, maps=(*maps, axes), **parameters)
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = rule


def def_jvp(primitive: Primitive, rule: Callable[..., tuple[list, list]]) -> None:
    """`rule(primals, tangents, **parameters)` without maps. None is a tangent that is zero, also in the results."""

    def rule_with_maps(primals: Sequence[Any], tangents: Sequence[Any], maps: Maps, **parameters: Any) -> tuple:
        if not maps:
            return rule(primals, tangents, **parameters)
        *maps_inside, axes = maps
        inside = lambda primals, tangents: rule_with_maps(primals, tangents, tuple(maps_inside), **parameters)
        return jax.vmap(inside, in_axes=(list(axes), _where(tangents, axes)))(list(primals), list(tangents))

    def with_zeros(primals: Sequence[Any], tangents: Sequence[Any], **parameters: Any) -> tuple:
        tangents = [None if isinstance(x, ad.Zero) else x for x in tangents]
        results, tangents = rule_with_maps(primals, tangents, **parameters)
        zero = lambda x: ad.Zero(jax.typeof(x).to_tangent_aval())
        return results, [zero(x) if dx is None else dx for x, dx in zip(results, tangents)]

    ad.primitive_jvps[primitive] = with_zeros


def def_transpose(primitive: Primitive, rule: Callable[..., list]) -> None:
    """`rule(cotangents, arguments, **parameters)` without maps, where the arguments in which it is linear are None.

    It returns their cotangents, in their order.
    """

    def rule_with_maps(cotangents: list, arguments: list, maps: Maps, linear: Maps, **parameters: Any) -> list:
        if not maps:
            return rule(cotangents, arguments, **parameters)
        (*maps_inside, axes), (*linear_inside, linear_axes) = maps, linear

        def inside(cotangents: list, arguments: list) -> list:
            return rule_with_maps(cotangents, arguments, tuple(maps_inside), tuple(linear_inside), **parameters)

        results = jax.vmap(inside, in_axes=(0, _where(arguments, axes)))(cotangents, arguments)
        return [x if axis == 0 else jnp.sum(x, axis=0, dtype=x.dtype) for x, axis in zip(results, linear_axes)]

    def with_undefined(cotangents: Sequence[Any], *arguments: Any, maps: Maps, **parameters: Any) -> list:
        is_linear = [ad.is_undefined_primal(x) for x in arguments]
        linear = tuple(tuple(axis for axis, is_one in zip(axes, is_linear) if is_one) for axes in maps)
        known = [None if is_one else x for x, is_one in zip(arguments, is_linear)]
        cotangents = [ad.instantiate_zeros(x) for x in cotangents]
        results = iter(rule_with_maps(cotangents, known, maps, linear, **parameters))
        return [next(results) if is_one else None for is_one in is_linear]

    ad.primitive_transposes[primitive] = with_undefined


def _where(arrays: Sequence[Any], axes: Axes) -> list:
    """The axes of the arrays that are not None."""
    return [None if x is None else axis for x, axis in zip(arrays, axes)]


def _without_axis(x: Any) -> Any:
    return x.update(shape=x.shape[1:], sharding=x.sharding.update(spec=x.sharding.spec[1:]))


def _with_axes(x: Any, outside: list[tuple[Any, Any]]) -> Any:
    sizes, cuts = [size for size, _ in outside], [cut for _, cut in outside]
    return x.update(shape=(*sizes, *x.shape), sharding=x.sharding.update(spec=(*cuts, *x.sharding.spec)))
