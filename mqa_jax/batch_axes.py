"""Leading batch axes: callers may pass any number of them, the implementations get exactly one."""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mqa_jax.inputs import Inputs

Results = TypeVar("Results")  # a tuple of arrays, each with the batch axis first, or None


def over_flat_batch(run: Callable[[Inputs], Results], inputs: Inputs) -> Results:
    """Calls `run` on inputs with one batch axis; its results get the leading axes of the query.

    All axes but the last are mapped over with `jax.vmap`, whose rule for attention makes one axis of them (`as_rows`).
    A bias or mask that is shared along an axis is not mapped over.
    """
    batch = inputs.operands.query.shape[:-3]
    if not batch:
        one_row = map_arrays(inputs, lambda x: x[None], for_all_rows=lambda x: x)
        return jax.tree.map(lambda x: x[0], run(one_row))
    if len(batch) == 1:
        return run(inputs)
    is_shared = lambda x: x.shape[0] != batch[0]
    axes = map_arrays(inputs, lambda x: None if is_shared(x) else 0, for_all_rows=lambda x: None)
    inputs = map_arrays(inputs, lambda x: x[0] if is_shared(x) else x, for_all_rows=lambda x: x)
    return jax.vmap(lambda row: over_flat_batch(run, row), in_axes=(axes,))(inputs)


def as_rows(inputs: Inputs, axes: Sequence[int | None]) -> list[Array] | None:
    """The leaves of inputs with one batch axis, into which the first of the two axes of some leaves goes.

    `axes` has 0 for each leaf with the additional axis. None where a large array would have to be copied, or an array
    for all rows differs along the axis; and on a mesh, which may cut one of the axes.
    """
    query, pairs = inputs.operands.query, (inputs.operands.bias, inputs.mask.allowed)
    for_all = jax.tree.leaves(map_arrays(inputs, lambda x: False, for_all_rows=lambda x: True))
    leaves = jax.tree.leaves(inputs)
    if axes[0] is None or _on_a_mesh(query):
        return None
    count, batch = query.shape[:2]
    flat = []
    for x, axis, is_for_all in zip(leaves, axes, for_all, strict=True):
        if is_for_all:
            fits = axis is None
        elif axis == 0:
            fits = x.shape[1] == batch
            x = x.reshape(count * x.shape[1], *x.shape[2:])
        elif any(x is pair for pair in pairs) or x.shape[0] != batch:
            fits = x.shape[0] == 1  # shared by all rows
        else:
            fits = x.ndim <= 2  # a few numbers for each row
            x = jnp.broadcast_to(x, (count, *x.shape)).reshape(count * batch, *x.shape[1:]) if fits else x
        if not fits:
            return None
        flat.append(x)
    return flat


def _on_a_mesh(x: Array) -> bool:
    meshes = jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()
    return any(not mesh.empty and mesh.size > 1 for mesh in meshes)


def map_arrays(node: Any, with_batch: Callable[[Array], Any], for_all_rows: Callable[[Array], Any]) -> Any:
    """Changes the arrays of a dataclass: `with_batch` those with leading batch axes, `for_all_rows` the others."""
    changes = {}
    for each in fields(node):
        x = getattr(node, each.name)
        if x is None or each.metadata.get("static"):
            continue
        if is_dataclass(x):
            changes[each.name] = map_arrays(x, with_batch, for_all_rows)
        else:
            change = for_all_rows if each.metadata.get("for_all_rows") else with_batch
            changes[each.name] = jax.tree.map(change, x)
    return replace(node, **changes)
