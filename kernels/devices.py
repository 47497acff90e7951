"""Attention on a mesh of devices: how the primitives are lowered where there is more than one.

    one device, or all mesh axes manual (inside `jax.shard_map`)    the passes as they are
    Explicit mesh axes     `jax.shard_map` around the passes; the types of the arrays say how they are cut
    Auto mesh axes         `custom_partitioning` around the passes; XLA decides how the arrays are cut

All of it belongs to lowering, so derivatives and `jax.vmap` do not see it. `mqa_jax.axes.Cut` says what a device
computes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from mqa_jax import axes
from mqa_jax.axes import Cut
from mqa_jax.kernels import mapped
from mqa_jax.kernels.mapped import Maps


class Letters(NamedTuple):
    """The axes of each argument and result of a primitive without maps. Gradients are summed over devices."""

    arguments: list[str]
    results: list[str]
    are_gradients: bool = False


class Call(NamedTuple):
    """One call of a primitive: `compute`, its parameters, and the axes of whole arguments and results."""

    compute: Callable[..., list]
    maps: Maps
    parameters: dict[str, Any]
    letters: Letters
    arguments: list[Any]  # shapes
    results: list[Any]

    def run(self, compute: Callable[..., list]) -> Callable[..., list]:
        return mapped.over(self.maps, functools.partial(compute, **self.parameters))

    @property
    def letters_of_arguments(self) -> list[str]:
        """With a digit for each axis that `jax.vmap` has added."""
        digits = lambda i: "".join(
            str(level) for level, mapped_axes in reversed([*enumerate(self.maps)]) if mapped_axes[i] == 0
        )
        return [
            axes.expanded(digits(i) + letters, len(x.shape))
            for i, (letters, x) in enumerate(zip(self.letters.arguments, self.arguments, strict=True))
        ]

    @property
    def letters_of_results(self) -> list[str]:
        digits = "".join(str(level) for level in reversed(range(len(self.maps))))
        return [
            axes.expanded(digits + letters, len(x.shape))
            for letters, x in zip(self.letters.results, self.results, strict=True)
        ]

    @property
    def heads(self) -> tuple[int, int]:
        """N and K."""
        return self.arguments[0].shape[-2], self.arguments[1].shape[-2]

    def specs(self, cut: Cut) -> tuple[list[PartitionSpec], list[PartitionSpec]]:
        """Of arguments and results."""
        of = lambda letters, arrays: [cut.spec(one, x.shape) for one, x in zip(letters, arrays, strict=True)]
        return of(self.letters_of_arguments, self.arguments), of(self.letters_of_results, self.results)

    def part(self, cut: Cut) -> Callable[..., list]:
        """What a device computes, of its parts of the arguments."""
        sums: list[tuple[str, ...]] = [()] * len(self.results)
        if self.letters.are_gradients:
            count = len(self.maps)
            sums = [cut.summed(one[count:], x.shape[count:]) for one, x in zip(self.letters_of_results, self.results)]
        return self.run(functools.partial(_part, self.compute, cut, self.letters, sums))


def _part(
    compute: Callable, cut: Cut, letters: Letters, sums: list, *arguments: Array, tree: Any, **parameters: Any
) -> list[Array]:
    own = [cut.own_kv_head(one, x) for one, x in zip(letters.arguments, arguments, strict=True)]
    inputs = cut.local(jax.tree.unflatten(tree, own[: tree.num_leaves]))
    leaves, tree_of_part = jax.tree.flatten(inputs)
    results = compute(*leaves, *own[tree.num_leaves :], tree=tree_of_part, **parameters)
    if not letters.are_gradients:
        return results
    whole = [cut.among_kv_heads(one, x) for one, x in zip(letters.results, results, strict=True)]
    return [lax.psum(x, names) if names else x for x, names in zip(whole, sums, strict=True)]


def lowering(compute: Callable[..., list], letters: Callable[..., Letters]) -> Callable[..., Any]:
    """The lowering rule of a primitive."""

    def rule(context: Any, *values: Any, maps: Maps, **parameters: Any) -> Any:
        call = Call(compute, maps, parameters, letters(**parameters), context.avals_in, context.avals_out)
        function, avals = _placed(context, call)
        return mlir.lower_fun(function, multiple_results=True)(context.replace(avals_in=avals), *values)

    return rule


def _placed(context: Any, call: Call) -> tuple[Callable[..., list], Sequence[Any]]:
    axis_context = context.module_context.axis_context
    manual: frozenset = getattr(axis_context, "manual_axes", frozenset())
    if manual:
        _check_manual(axis_context.mesh, manual)
        return call.run(call.compute), [_without_types(x) for x in call.arguments]
    mesh = call.arguments[0].sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        return _explicit(call, mesh), call.arguments
    if getattr(axis_context, "num_devices", 1) == 1 or getattr(axis_context, "device_assignment", None) is None:
        return call.run(call.compute), call.arguments
    _check_automatic(context.module_context)
    return _automatic(call, context), call.arguments


def _check_manual(mesh: Any, manual: frozenset) -> None:
    others = {name: size for name, size in mesh.shape.items() if name not in manual and size > 1}
    if others:
        raise NotImplementedError(
            "Attention inside jax.shard_map needs all mesh axes to be manual, because XLA cannot cut its kernels over "
            f"the others: manual axes {sorted(manual)}, others {others}. Leave out `axis_names` of jax.shard_map."
        )


def _check_automatic(module: Any) -> None:
    reasons = {"jax.export": module.lowering_parameters.for_export, "a TPU": "tpu" in module.platforms}
    if found := [name for name, is_one in reasons.items() if is_one]:
        raise NotImplementedError(
            f"Attention cannot be cut over Auto mesh axes for {' on '.join(found)}: custom_partitioning does "
            f"not support it (num_devices={module.axis_context.num_devices}). Use Explicit mesh axes, or jax.shard_map."
        )


def needs_devices(primitive: Primitive) -> Primitive:
    """JAX passes devices only to the lowering rules of primitives in a table, which is private.

    Without them arrays on Auto mesh axes are gathered.
    """
    try:
        from jax._src.dispatch import prim_requires_devices_during_lowering as table
    except ImportError:
        return primitive
    table.add(primitive)
    return primitive


def _without_types(x: Any) -> Any:
    """Without varying axes: inside a kernel all arrays vary alike, and loops start from constants, which do not."""
    return jax.core.ShapedArray(x.shape, x.dtype)


# -- Explicit axes ----------------------------------------------------------------------------------------------------


def _explicit(call: Call, mesh: Any) -> Callable[..., list]:
    names = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit}
    cut = cut_of(call, mesh.shape.items(), [x.sharding.spec for x in call.arguments])
    arguments, results = call.specs(cut)
    run = jax.shard_map(
        call.part(cut), mesh=mesh, in_specs=tuple(arguments), out_specs=results, axis_names=names, check_vma=False
    )
    place = lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec))

    def function(*values: Array) -> list[Array]:
        found = run(*(place(x, spec) for x, spec in zip(values, arguments, strict=True)))
        return [place(x, promised.sharding.spec) for x, promised in zip(found, call.results, strict=True)]

    return function


def cut_of(call: Call, mesh: Any, specs: Sequence[PartitionSpec]) -> Cut:
    """The cut of the queries, and of the axes that `jax.vmap` has added."""
    found: dict[str, tuple[str, ...]] = {}
    for letters, spec in reversed([*zip(call.letters_of_arguments, specs, strict=True)]):
        for letter, names in zip(letters, spec):
            if letter.isdigit() and names is not None:
                found[letter] = _tuple(names)
    for letter, names in zip(call.letters_of_arguments[0], specs[0]):
        if letter in "btn" and names is not None:
            found[letter] = _tuple(names)
    return Cut(tuple(mesh), tuple(sorted(found.items())), *call.heads)


def _tuple(names: Any) -> tuple[str, ...]:
    return names if isinstance(names, tuple) else (names,)


# -- Auto axes --------------------------------------------------------------------------------------------------------


def _automatic(call: Call, context: Any) -> Callable[..., list]:
    def partition(mesh: Any, arguments: Any, results: Any) -> tuple:
        if mesh.empty:
            mesh = Mesh(np.array(context.module_context.axis_context.device_assignment), ("devices",))
        cut = _possible(cut_of(call, mesh.shape.items(), [spec_of(x, mesh) for x in arguments]), call)
        cut = cut.with_axis_of_kv_heads()  # XLA cuts them by a part of a mesh axis
        mesh = Mesh(mesh.devices.reshape([size for _, size in cut.mesh]), [name for name, _ in cut.mesh])
        specs = [[NamedSharding(mesh, spec) for spec in group] for group in call.specs(cut)]
        return mesh, call.part(cut), specs[1], tuple(specs[0])

    run = call.run(call.compute)
    function = custom_partitioning(lambda *values: run(*values))
    function.def_partition(partition, sharding_rule=_rule(call), decode_shardings=False)
    return function


def _possible(cut: Cut, call: Call) -> Cut:
    """Without what does not divide into equal parts: XLA then gathers that axis."""
    sizes = dict(zip(call.letters_of_arguments[0], call.arguments[0].shape))
    fits = lambda letter: letter.isdigit() or sizes[letter] % cut.count(letter) == 0
    heads = cut.count("n")
    kept = [letter for letter, _ in cut.axes if fits(letter)]
    if cut.kv_heads % heads != 0 and heads % cut.kv_heads != 0:
        kept = [letter for letter in kept if letter != "n"]
    return Cut(cut.mesh, tuple((x, names) for x, names in cut.axes if x in kept), cut.heads, cut.kv_heads)


def spec_of(x: Any, mesh: Mesh) -> PartitionSpec:
    """The mesh axes along which the parts of an array differ, for each axis of the array."""
    if x.sharding is None:
        return PartitionSpec()
    try:
        parts = x.sharding.devices_indices_map(tuple(x.shape))
    except (AssertionError, ValueError, NotImplementedError):  # unequal or partly manual parts
        return PartitionSpec()
    spec: list[Any] = []
    for axis in range(len(x.shape)):
        start = np.vectorize(lambda device, axis=axis: parts[device][axis].start or 0, otypes=[int])(mesh.devices)
        steps = {name: np.ptp(start, axis=i).max() for i, name in enumerate(mesh.axis_names)}
        names = sorted((name for name, step in steps.items() if step), key=lambda name: -steps[name])
        spec.append(tuple(names) or None)
    return PartitionSpec(*spec)


def _rule(call: Call) -> SdyShardingRule:
    """For XLA: batch rows, queries and heads may be cut, everything else is needed whole."""
    heads, kv_heads = call.heads
    group, whole, fresh = heads // kv_heads, dict[str, None](), iter(range(1 << 20))

    def factor(letter: str, size: int) -> Any:
        if size != 1 and letter == "n" and 1 not in (group, kv_heads):
            return CompoundFactor("k", "g")
        if size != 1 and letter in "btnk":
            return ("k" if group == 1 else "g") if letter == "n" else letter
        if size != 1 and letter.isdigit():
            return f"m{letter}"
        name = f"{'x' if letter.isdigit() else letter}_{next(fresh)}" if size == 1 or letter == "x" else letter
        whole[name] = None
        return name

    mapping = lambda letters, x: ArrayMapping(*map(factor, letters, x.shape))
    arguments = tuple(map(mapping, call.letters_of_arguments, call.arguments))
    results = tuple(map(mapping, call.letters_of_results, call.results))
    sizes: dict[str, Any] = {"g": group} if 1 not in (group, kv_heads) else {}
    return SdyShardingRule(arguments, results, need_replication_factors=tuple(whole), **sizes)


# -- types ------------------------------------------------------------------------------------------------------------


def like(x: Any, shape: Sequence[Any], dtype: Any) -> Any:
    """An array whose first axes are those of x and cut as they are, and that varies over the same manual axes."""
    spec = [*x.sharding.spec, *[None] * len(x.shape)][: len(shape)]
    return x.update(shape=tuple(shape), dtype=np.dtype(dtype), weak_type=False, sharding=x.sharding.update(spec=spec))
