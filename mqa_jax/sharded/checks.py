"""Checks of what attention over a cut sequence adds to `mqa_jax.checks`."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jaxtyping import Array

from mqa_jax.arguments import shown
from mqa_jax.axes import Cut, cuts_of_type
from mqa_jax.inputs import Inputs
from mqa_jax.kernels.platforms import Kernels
from mqa_jax.sharded.chunks import ORDERS, Order
from mqa_jax.sharded.strategies import AxisName

STRATEGIES = "ring", "all_gather"


def known(strategy: str, order: str) -> None:
    for name, word, words in (("strategy", strategy, STRATEGIES), ("order", order, ORDERS)):
        if word not in words:
            raise ValueError(f"Unknown {name}={word!r}: use one of {list(words)}.")


def axis_size(axis: AxisName) -> int:
    """Inside of `jax.shard_map`."""
    try:
        return lax.axis_size(axis)
    except (NameError, TypeError) as error:
        raise _no_mesh_axis(axis) from error


def is_manual(axis: AxisName) -> bool:
    """Whether it names mesh axes of the `jax.shard_map` around the call."""
    return _as_set(axis) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def varying(axis: AxisName, x: Array) -> list[str]:
    """Those of these mesh axes of the `jax.shard_map` along which its type says that devices have other parts."""
    return sorted(_as_set(axis) & set(jax.typeof(x).manual_axis_type.varying))


def _as_set(axis: AxisName) -> set[str]:
    return set(axis) if isinstance(axis, tuple) else {axis}


def of_mesh(axis: AxisName) -> None:
    """Not one of `jax.vmap`."""
    if not is_manual(axis):
        raise _no_mesh_axis(axis)


def _no_mesh_axis(axis: AxisName) -> ValueError:
    there = list(jax.sharding.get_abstract_mesh().manual_axes)
    return ValueError(
        f"axis_name must name a mesh axis of the jax.shard_map around the call: axis_name={axis!r}, manual axes "
        f"{there}. Outside of jax.shard_map, call sharded_attention."
    )


def possible(inputs: Inputs, order: str) -> None:
    no_ring_buffer(inputs)
    mask = inputs.mask
    if order == "zigzag" and (not mask.is_causal or mask.window is not None):
        raise ValueError(
            "order='zigzag' is for causal attention without a window; without a causal mask, or with a window, "
            f"order='contiguous' gives all devices equal work: is_causal={mask.is_causal}, "
            f"local_window_size={mask.window}."
        )


def no_ring_buffer(inputs: Inputs) -> None:
    if inputs.mask.ring is not None:
        raise NotImplementedError(
            "key_value_ring_lengths cannot be combined with a sequence that is cut over devices, whose slots hold any "
            f"position: slots={inputs.mask.ring.slots}. Use a cache of all positions, with key_value_seq_lengths."
        )


def results(inputs: Inputs, found: tuple[Array, Array | None]) -> Any:
    """What the caller asked for."""
    return found if inputs.residual else found[0]


def divides(order: Order, inputs: Inputs) -> None:
    size = inputs.sizes
    if size.T % order.count or size.S % order.count:
        raise ValueError(
            "With order='zigzag' the length must be a multiple of 2 * devices: "
            f"T={size.T * order.devices}, S={size.S * order.devices}, devices={order.devices}. Pad the sequence."
        )


def kernels(implementation: str | None, compute: Any) -> Kernels:
    if not isinstance(compute, Kernels):
        raise NotImplementedError(
            f"implementation={implementation!r} has no passes that could run on a part of the keys. "
            "Use implementation=None, 'triton' or 'xla'."
        )
    return compute


def belong_together(part: Array, tokens: Array) -> None:
    """A cache and new tokens."""
    shapes = [(x.shape[:1], *x.shape[2:]) for x in (part, tokens)]
    if min(part.ndim, tokens.ndim) < 2 or shapes[0] != shapes[1] or part.dtype != tokens.dtype:
        raise ValueError(
            "tokens [B, T, ...] must have the dtype of the cache [B, S/n, ...] and its axes but the second: "
            f"tokens={shown(tokens)}, part={shown(part)}. Cast or reshape them."
        )


# -- whole arrays -----------------------------------------------------------------------------------------------------


def mesh_of(mesh: Any, **arrays: Any) -> Any:
    """The mesh of the call: the one given, or the one in use."""
    mesh = mesh_in_use(**arrays) if mesh is None else mesh
    if mesh is None:
        raise ValueError(
            "sharded_attention needs a mesh, and neither jax.set_mesh nor the arrays have one: mesh=None. Pass mesh=, "
            "or call inside of jax.set_mesh(mesh)."
        )
    return mesh


def mesh_in_use(**arrays: Any) -> Any:
    """That of `jax.set_mesh`, or that of the arrays; None if there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh
    found = {name: _mesh_of_array(x) for name, x in arrays.items()}
    given = list(dict.fromkeys(x for x in found.values() if x is not None))
    if len(given) > 1:
        raise ValueError(f"{', '.join(found)} must be on one mesh: {found}. Place them with jax.device_put.")
    return given[0] if given else None


def _mesh_of_array(x: Any) -> Any:
    if isinstance(x, jax.Array):
        mesh = jax.typeof(x).sharding.mesh
        if isinstance(x, jax.core.Tracer) or not mesh.empty:
            return None if mesh.empty else mesh
        return getattr(x.sharding, "mesh", None)
    return None


def cut_of(
    mesh: Any,
    query: Array,
    key: Array,
    sequence: AxisName,
    batch: AxisName | None,
    heads: AxisName | None,
    whole_queries: bool = False,
) -> Cut:
    """The mesh axes of each axis of the arrays; queries may be whole where keys are cut."""
    words = {"sequence_axis": sequence, "batch_axis": batch, "heads_axis": heads}
    names = {name: _names(name, word, mesh) for name, word in words.items()}
    of_rows, _, of_heads, _ = ((), *cuts_of_type(query))[-4:]
    for name, found in (("batch_axis", of_rows), ("heads_axis", of_heads)):
        if words[name] is None:  # then its type says it, on Explicit axes
            names[name] = tuple(x for x in found if x not in names["sequence_axis"])
    every = [name for group in names.values() for name in group]
    if len(set(every)) < len(every):
        raise ValueError(f"A mesh axis can cut one axis of the arrays: {names}. Give each another mesh axis.")
    (*_, rows, queries, query_heads, _), (*_, keys, kv_heads, _) = (1, *query.shape), key.shape
    by_letter = dict(zip("sbn", names.values()))
    by_letter["t"] = () if whole_queries else by_letter["s"]
    cut = Cut(tuple(mesh.shape.items()), tuple(by_letter.items()), query_heads, kv_heads)
    lengths = {
        "query length T": ("t", queries),
        "key length S": ("s", keys),
        "batch B": ("b", rows),
        "number of query heads N": ("n", query_heads),
    }
    for name, (letter, length) in lengths.items():
        if length % cut.count(letter):
            raise ValueError(
                f"The {name} must be a multiple of the devices that share it: {letter.upper()}={length}, mesh axes "
                f"{cut.names(letter)}, devices={cut.count(letter)}. Pad the arrays, or use fewer devices."
            )
    _check_heads(cut)
    return cut


def _names(name: str, word: Any, mesh: Any) -> tuple[str, ...]:
    is_left_out = word is None and name != "sequence_axis"
    names = () if is_left_out else tuple(word) if isinstance(word, Sequence) and not isinstance(word, str) else (word,)
    if unknown := [x for x in names if x not in mesh.shape]:
        raise ValueError(
            f"{name} must name axes of the mesh: {name}={shown(word)}, unknown {unknown}, mesh {dict(mesh.shape)}."
        )
    return names


def count(name: str, word: Any, mesh: Any) -> int:
    """The devices along these mesh axes, one where there are none."""
    return math.prod(mesh.shape[x] for x in _names(name, word, mesh))


def _check_heads(cut: Cut) -> None:
    devices = cut.count("n")
    if cut.kv_heads % devices and devices % cut.kv_heads:
        raise ValueError(
            "The number of key/value heads and that of the devices that share the heads must divide one another: "
            f"kv_heads={cut.kv_heads}, devices={devices}. Use another heads_axis, or repeat the heads."
        )
