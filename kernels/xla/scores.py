"""The scores of a tile, its matrix products, and dropout of its weights."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from mqa_jax import dropout, masks
from mqa_jax.kernels.xla.tile import Place, Scores, Tiling
from mqa_jax.shapes import positions


def product(tiling: Tiling, equation: str, left: Array, right: Array, dtype: DTypeLike | None = None) -> Array:
    """A matrix product of numbers in `dtype`, by default the query's, with sums in `score_dtype`."""
    sums = tiling.inputs.score_dtype
    dtype = sums if tiling.shape.upcast else dtype or tiling.inputs.dtype
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(equation, left, right, precision=tiling.inputs.precision, preferred_element_type=sums)


def scores(
    tiling: Tiling, query: Float[Array, "P R H"], key: Real[Array, "P bk H"], may_attend: Array | None, place: Place
) -> tuple[Scores, Scores | None]:
    """The scores of a tile, -inf where hidden, and the tanh of the soft cap for the backward pass."""
    operands, cap, tanh = tiling.inputs.operands, tiling.inputs.logits_soft_cap, None
    score = tiling.as_tile(product(tiling, "prh,pkh->prk", query, key) * tiling.inputs.scale)
    if operands.key_scale is not None:
        score = score * tiling.scales(operands.key_scale, place)
    if cap is not None:
        tanh = jnp.tanh(score / cap)
        score = cap * tanh
    if operands.bias is not None:
        score = score + tiling.split_heads(tiling.pairs(operands.bias, place)).astype(score.dtype)
    if operands.alibi_slopes is not None:
        score = score - tiling.heads(operands.alibi_slopes, place) * distance(tiling, place)
    return score if may_attend is None else jnp.where(may_attend, score, -jnp.inf), tanh


def distance(tiling: Tiling, place: Place) -> Float[Array, "1 bq 1 bk"]:
    """|query position - key position|."""
    distance = masks.distance(tiling.mask_of_row(place), tiling.rows(place), tiling.columns(place))
    return tiling.split_heads(distance).astype(tiling.inputs.score_dtype)


def drop(tiling: Tiling, weight: Float[Array, "P R bk"], place: Place) -> Float[Array, "P R bk"]:
    """Dropout, of the weights or of their gradients."""
    spec, shape = tiling.inputs.dropout, tiling.shape
    if spec is None:
        return weight
    head = place.head * tiling.sizes.G + positions(shape.heads * tiling.sizes.G).reshape(-1, 1, tiling.sizes.G, 1)
    row, column = tiling.rows(place)[None, :, None, None], tiling.columns(place)[None, None, None]
    kept = dropout.keep(spec, spec.batch[place.batch], head, row, column)
    return jnp.where(tiling.as_matrix(kept), weight * spec.scale, 0.0)
