"""Leading batch axes: any number outside, exactly one inside."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from mqa_jax.inputs import Inputs
from mqa_jax.options import Options

Results = TypeVar("Results")  # a tuple of arrays, each with the batch axis first, or None


def over_flat_batch(run: Callable[[Inputs], Results], inputs: Inputs) -> Results:
    """Calls `run` on inputs with one batch axis; its results get the leading axes of the query.

    A bias or mask that is shared along some leading axes but not along others cannot be flattened without copying it:
    then the first axis is mapped over, and the same rule applied to the rest.
    """
    batch = inputs.operands.query.shape[:-3]
    pairs = [x for x in (inputs.operands.bias, inputs.mask.allowed) if x is not None]
    if all(x.shape[:-3] in (batch, (1,) * len(batch)) for x in pairs):
        flat = _each_batched(inputs, lambda x, axes: x.reshape(math.prod(x.shape[:axes]), *x.shape[axes:]))
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), run(flat))
    shared = lambda x: x.shape[0] != batch[0]
    axes = _each_batched(inputs, lambda x, _: None if shared(x) else 0, otherwise=None)
    inputs = _each_batched(inputs, lambda x, _: x[0] if shared(x) else x)
    return jax.vmap(lambda row: over_flat_batch(run, row), in_axes=(axes,))(inputs)


# Arrays of a call with a batch axis, and how many axes they have behind it.
_OF_A_ROW = dict(
    query_seq_lengths=0,
    key_value_seq_lengths=0,
    key_value_ring_lengths=0,
    query_offset=0,
    query_segment_ids=1,
    key_value_segment_ids=1,
    key_scale=2,
    value_scale=2,
)


def without_batch_of_one(arrays: list[Any], options: Options) -> tuple[list[Any], Options]:
    """One sequence `[T, N, H]` may come with other arrays that are a batch of one, `[1, S, K, H]`, as in `jax.nn`.

    Args:
      arrays: query, key, value, bias and mask, with three axes in a row of a batch; the query's say what a row is.
    """
    if np.ndim(arrays[0]) != 3:
        return arrays, options

    def alone(x: ArrayLike | None, axes: int) -> ArrayLike | None:
        shape = np.shape(x) if x is not None else ()
        return jnp.asarray(x).reshape(shape[1:]) if len(shape) == axes + 1 and shape[0] == 1 else x

    changed = {field.name: getattr(options, field.name) for field in fields(Options) if field.name in _OF_A_ROW}
    changed = {name: alone(x, _OF_A_ROW[name]) for name, x in changed.items()}
    return [alone(x, 3) for x in arrays], replace(options, **changed)


def _each_batched(inputs: Inputs, function: Callable[[Array, int], Any], **otherwise: Any) -> Inputs:
    """Applies `function(x, number of leading axes)` to arrays with batch axes; others stay, or become `otherwise`."""
    axes = inputs.operands.query.ndim - 3

    def apply(x: Array | None) -> Any:
        return None if x is None else function(x, axes)

    def keep(x: Array | None) -> Any:
        return otherwise.get("otherwise", x)

    operands, mask, dropout = inputs.operands, inputs.mask, inputs.dropout
    return replace(
        inputs,
        operands=replace(
            operands,
            query=apply(operands.query),
            key=apply(operands.key),
            value=apply(operands.value),
            bias=apply(operands.bias),
            alibi_slopes=keep(operands.alibi_slopes),
            sinks=keep(operands.sinks),
            key_scale=apply(operands.key_scale),
            value_scale=apply(operands.value_scale),
        ),
        mask=replace(
            mask,
            query_offset=apply(mask.query_offset),
            allowed=apply(mask.allowed),
            query_lengths=apply(mask.query_lengths),
            key_lengths=apply(mask.key_lengths),
            query_segments=apply(mask.query_segments),
            key_segments=apply(mask.key_segments),
            ring=None if mask.ring is None else replace(mask.ring, lengths=apply(mask.ring.lengths)),
        ),
        dropout=None if dropout is None else replace(dropout, seed=keep(dropout.seed), batch=apply(dropout.batch)),
    )
