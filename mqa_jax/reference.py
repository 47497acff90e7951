"""Textbook attention in float32 (float64 for float64 queries): the definition of what every implementation computes.

It is the oracle of the tests. It builds the whole `[B, N, T, S]` array of weights. JAX differentiates it, to any order,
in forward and reverse mode.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from mqa_jax import dropout, masks, quantization
from mqa_jax.inputs import Inputs
from mqa_jax.shapes import LogSumExp, Output, positions


def forward(inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """The output, in the dtype of the query, and, with `inputs.residual`, the log-sum-exp of the scores and the sink.

    In rows that have neither a visible key nor a sink, such as padding, they are 0 and -inf.
    """
    out, log_sum_exp, _ = forward_with_weights(inputs)
    return out, log_sum_exp if inputs.residual else None


def forward_with_weights(inputs: Inputs) -> tuple[Output, LogSumExp, Float[Array, "B N T S"]]:
    """As `forward`, and the weights that multiply the values (after dropout), `[B, N, T, S]`."""
    dtype = inputs.score_dtype
    value = _scaled(inputs.operands.value, inputs.operands.value_scale, dtype)
    value = _without_padding(value, inputs.mask.key_lengths)
    score = scores(inputs)  # [B, N, T, S]
    highest = jnp.max(score, axis=-1, initial=-jnp.inf, keepdims=True)  # [B, N, T, 1]
    sink = sinks_of_rows(inputs)
    if sink is not None:
        highest = jnp.maximum(highest, sink)
    empty = highest == -jnp.inf
    highest = jax.lax.stop_gradient(jnp.where(empty, 0.0, highest))
    weight = jnp.exp(score - highest)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - highest)
    total = jnp.where(empty, 1.0, total)
    log_sum_exp = jnp.where(empty, -jnp.inf, highest + jnp.log(total))[..., 0]  # [B, N, T]
    weight = _drop(weight / total, inputs)
    grouped = weight.reshape(*weight.shape[:1], inputs.sizes.K, inputs.sizes.G, *weight.shape[2:])
    out = jnp.einsum("bkgts,bskv->btkgv", grouped, value, precision="highest")
    out = out.reshape(*out.shape[:2], inputs.sizes.N, inputs.sizes.V).astype(inputs.dtype)
    return out, log_sum_exp.transpose(0, 2, 1), weight


def scores(inputs: Inputs) -> Float[Array, "B N T S"]:
    """The arguments of the softmax, -inf where the mask hides a pair."""
    operands, size, dtype = inputs.operands, inputs.sizes, inputs.score_dtype
    rows, columns = positions(size.T), positions(size.S)
    query = _without_padding(operands.query.astype(dtype), inputs.mask.query_lengths)
    query = query.reshape(size.B, size.T, size.K, size.G, size.H)
    key = _without_padding(_scaled(operands.key, operands.key_scale, dtype), inputs.mask.key_lengths)
    score = jnp.einsum("btkgh,bskh->bkgts", query, key, precision="highest").reshape(size.B, size.N, size.T, size.S)
    score = score * inputs.scale
    if inputs.logits_soft_cap is not None:
        score = inputs.logits_soft_cap * jnp.tanh(score / inputs.logits_soft_cap)
    if inputs.score_fn is not None:
        query_positions, key_positions = masks.of_pairs(inputs.mask, rows, columns)
        score_fn = inputs.score_fn.joined(operands.score_arrays)
        score = score_fn.of_pairs(score, head=positions(size.N), query=query_positions, key=key_positions)
    if operands.bias is not None:
        score = score + operands.bias.astype(dtype)
    if operands.alibi_slopes is not None:
        distance = masks.distance(inputs.mask, rows, columns).astype(dtype)
        score = score - operands.alibi_slopes.astype(dtype)[None, :, None, None] * distance
    may_attend = masks.visible(inputs.mask, rows, columns, positions(size.N))
    return score if may_attend is None else jnp.where(may_attend, score, -jnp.inf)


def sinks_of_rows(inputs: Inputs) -> Float[Array, "#B N #T 1"] | None:
    """The sink of each row; -inf, which means no sink, in queries that are padding."""
    if inputs.operands.sinks is None:
        return None
    sinks = inputs.operands.sinks.astype(inputs.score_dtype)[None, :, None, None]
    exist = masks.exist(inputs.mask.query_lengths, positions(inputs.sizes.T))
    return sinks if exist is None else jnp.where(exist[:, None, :, None], sinks, -jnp.inf)


def _scaled(
    x: Real[Array, "B S K Z"], scale: Float[Array, "B S K"] | None, dtype: DTypeLike
) -> Float[Array, "B S K Z"]:
    return x.astype(dtype) if scale is None else quantization.dequantize(x, scale.astype(dtype))


def _without_padding(x: Float[Array, "B X Y Z"], lengths: Array | None) -> Float[Array, "B X Y Z"]:
    """Zero beyond the length: padding may hold NaN, and 0 * NaN is NaN, so it is cleared before any product."""
    if lengths is None:
        return x
    return jnp.where((positions(x.shape[1])[None] < lengths[:, None])[..., None, None], x, 0.0)


def _drop(weight: Float[Array, "B N T S"], inputs: Inputs) -> Float[Array, "B N T S"]:
    if inputs.dropout is None:
        return weight
    axes = [inputs.dropout.batch, *map(positions, weight.shape[1:])]
    batch, head, row, column = (jnp.expand_dims(x, [i for i in range(4) if i != axis]) for axis, x in enumerate(axes))
    kept = dropout.keep(inputs.dropout, batch, head, row, column)
    return jnp.where(kept, weight * inputs.dropout.scale, 0.0)
