"""One query on many keys in plain XLA, in one pass: the decoding step, bound by how fast the cache is read.

K/V are read where they lie, `[B, S, K, H]`: no transpose, no repeat, no copy. Scores are laid out `[B, S, N]`. Every
key of the array is read, used or not; the caller decides when that pays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax import dropout, masks
from mqa_jax.inputs import Inputs
from mqa_jax.kernels import online_softmax
from mqa_jax.shapes import Key, LogSumExp, Output, Value, positions

DecodeScores = Float[Array, "B S N"]


@dataclass(frozen=True)
class Products:
    """How the two matrix products are computed: q.k as `[B, S, N]`, and weights @ values as `[B, N, V]`."""

    scores: Callable[[Float[Array, "B K G H"], Key], DecodeScores]
    values: Callable[[DecodeScores, Value], Float[Array, "B N V"]]


def forward(inputs: Inputs, products: Products) -> tuple[Output, LogSumExp]:
    """`inputs` has T = 1."""
    size, operands = inputs.sizes, inputs.operands
    query = operands.query.reshape(size.B, size.K, size.G, size.H)
    score = _masked(inputs, products.scores(query, operands.key) * inputs.scale)
    highest = jnp.max(score, axis=1)  # [B, N]
    weight = jnp.exp(score - online_softmax.finite(highest)[:, None])
    total = jnp.sum(weight, axis=1)
    weighted = _values(inputs, products, _drop(inputs, weight))
    state = online_softmax.State(highest[..., None], total[..., None], weighted)
    sinks = None if operands.sinks is None else operands.sinks.astype(jnp.float32)[:, None]
    out, log_sum_exp = online_softmax.finish(state, sinks)
    return out[:, None].astype(inputs.dtype), log_sum_exp.reshape(size.B, 1, size.N)


def _masked(inputs: Inputs, score: DecodeScores) -> DecodeScores:
    operands, row, columns = inputs.operands, jnp.zeros(1, jnp.int32), positions(inputs.sizes.S)
    if inputs.logits_soft_cap is not None:
        score = inputs.logits_soft_cap * jnp.tanh(score / inputs.logits_soft_cap)
    if operands.bias is not None:
        score = score + _as_scores(operands.bias).astype(jnp.float32)
    if operands.alibi_slopes is not None:
        distance = jnp.abs(masks.key_minus_query_position(inputs.mask, row, columns)).astype(jnp.float32)
        score = score - operands.alibi_slopes.astype(jnp.float32) * _as_scores(distance)
    may_attend = masks.visible(inputs.mask, row, columns)
    return score if may_attend is None else jnp.where(_as_scores(may_attend), score, -jnp.inf)


def _values(inputs: Inputs, products: Products, weight: DecodeScores) -> Float[Array, "B N V"]:
    """Weights @ values. The padding has weight 0, but 0 * NaN is NaN: then, and only then, the padding is cleared."""
    value, lengths = inputs.operands.value, inputs.mask.key_lengths
    weighted = products.values(weight, value)
    if lengths is None:
        return weighted

    def cleared() -> Array:
        valid = positions(inputs.sizes.S) < lengths[:, None]
        return products.values(weight, jnp.where(valid[..., None, None], value, jnp.zeros((), value.dtype)))

    return lax.cond(jnp.all(jnp.isfinite(weighted)), lambda: weighted, cleared)


def _drop(inputs: Inputs, weight: DecodeScores) -> DecodeScores:
    spec = inputs.dropout
    if spec is None:
        return weight
    column, head = jnp.ogrid[: weight.shape[1], : weight.shape[2]]
    kept = dropout.keep(spec, spec.batch[:, None, None], head, jnp.zeros((), jnp.int32), column)
    return jnp.where(kept, weight * spec.scale, 0.0)


def _as_scores(x: Array) -> Array:
    """`[#B, #N, 1, #S]` -> `[#B, #S, #N]`."""
    return x[:, :, 0].swapaxes(1, 2)


# -- the products -----------------------------------------------------------------------------------------------------


def plain_scores(query: Float[Array, "B K G H"], key: Key) -> DecodeScores:
    """For accelerators."""
    return jnp.einsum("bkgh,bskh->bskg", query, key, preferred_element_type=jnp.float32).reshape(*key.shape[:2], -1)


def plain_values(weight: DecodeScores, value: Value) -> Float[Array, "B N V"]:
    weight = weight.reshape(*value.shape[:3], -1).astype(value.dtype)  # [B, S, K, G]
    weighted = jnp.einsum("bskg,bskv->bkgv", weight, value, preferred_element_type=jnp.float32)
    return weighted.reshape(value.shape[0], -1, value.shape[-1])


def packed_scores(query: Float[Array, "B K G H"], key: Key) -> DecodeScores:
    """One product `[S, K*H] @ [K*H, N]` with the queries on the block diagonal of the right side.

    K times the arithmetic, but the keys are read in order: for a product by head XLA's CPU code would transpose them.
    """
    batch, length, kv_heads, features = key.shape
    diagonal = jnp.eye(kv_heads, dtype=jnp.float32)[:, None, :, None]  # [K, 1, K, 1]
    query = query.astype(jnp.float32).swapaxes(2, 3)[:, :, :, None] * diagonal  # [B, K, H, K, G]
    key = key.astype(jnp.float32).reshape(batch, length, -1)
    return jnp.einsum("bsi,bin->bsn", key, query.reshape(batch, kv_heads * features, -1))


def packed_values(weight: DecodeScores, value: Value) -> Float[Array, "B N V"]:
    """As `packed_scores`: all heads against all, of which the diagonal is kept."""
    batch, length, kv_heads, features = value.shape
    value = value.astype(jnp.float32).reshape(batch, length, -1)
    everything = jnp.einsum("bsn,bsi->bni", weight, value).reshape(batch, kv_heads, -1, kv_heads, features)
    return jnp.einsum("bkgkv->bkgv", everything).reshape(batch, -1, features)


def summed_values(weight: DecodeScores, value: Value) -> Float[Array, "B N V"]:
    """Multiply and add without a matrix product; neighbouring keys first, so that the values are read in order."""
    batch, length, kv_heads, features = value.shape
    near = next(keys for keys in (8, 4, 2, 1) if length % keys == 0)
    weight = weight.reshape(batch, -1, near, kv_heads, weight.shape[-1] // kv_heads, 1)
    value = value.astype(jnp.float32).reshape(batch, -1, near, kv_heads, 1, features)
    return jnp.sum(jnp.sum(weight * value, axis=2), axis=1).reshape(batch, -1, features)


PLAIN = Products(plain_scores, plain_values)


def products_for_cpu(kv_heads: int) -> Products:
    """Measured on 2 AVX2 cores: beyond 8 heads, K-fold arithmetic on the values no longer hides behind memory."""
    return Products(packed_scores, packed_values if kv_heads <= 8 else summed_values)
