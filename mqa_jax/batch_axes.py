"""Leading batch axes: callers may pass any number of them, the implementations get exactly one."""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import jax
from jaxtyping import Array

from mqa_jax.inputs import Inputs

Results = TypeVar("Results")  # a tuple of arrays, each with the batch axis first, or None


def over_flat_batch(run: Callable[[Inputs], Results], inputs: Inputs) -> Results:
    """Calls `run` on inputs with one batch axis; its results get the leading axes of the query.

    A bias or mask that is shared along some leading axes but not along others cannot be flattened without copying it.
    In that case the first axis is mapped over with `jax.vmap`, and the same rule applies to the remaining axes.
    """
    batch = inputs.operands.query.shape[:-3]
    pairs = [x for x in (inputs.operands.bias, inputs.mask.allowed) if x is not None]
    if all(x.shape[:-3] in (batch, (1,) * len(batch)) for x in pairs):
        flatten = lambda x: x.reshape(math.prod(x.shape[: len(batch)]), *x.shape[len(batch) :])
        flat = _map_arrays(inputs, flatten, for_all_rows=lambda x: x)
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), run(flat))
    is_shared = lambda x: x.shape[0] != batch[0]
    axes = _map_arrays(inputs, lambda x: None if is_shared(x) else 0, for_all_rows=lambda x: None)
    inputs = _map_arrays(inputs, lambda x: x[0] if is_shared(x) else x, for_all_rows=lambda x: x)
    return jax.vmap(lambda row: over_flat_batch(run, row), in_axes=(axes,))(inputs)


def _map_arrays(node: Any, with_batch: Callable[[Array], Any], for_all_rows: Callable[[Array], Any]) -> Any:
    """Changes the arrays of a dataclass: `with_batch` those with leading batch axes, `for_all_rows` the others."""
    changes = {}
    for each in fields(node):
        x = getattr(node, each.name)
        if x is None or each.metadata.get("static"):
            continue
        if is_dataclass(x):
            changes[each.name] = _map_arrays(x, with_batch, for_all_rows)
        else:
            changes[each.name] = (for_all_rows if each.metadata.get("for_all_rows") else with_batch)(x)
    return replace(node, **changes)
