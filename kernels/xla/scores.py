"""The scores of a tile and their derivatives, its matrix products, and dropout of its weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Real

from mqa_jax import dropout, masks
from mqa_jax.kernels.xla.tile import Place, Scores, Tiling
from mqa_jax.pair_function import derivative


def product(tiling: Tiling, equation: str, left: Array, right: Array, dtype: DTypeLike | None = None) -> Array:
    """A matrix product of numbers in `dtype`, by default the query's, with sums in `score_dtype`."""
    sums = tiling.inputs.score_dtype
    dtype = sums if tiling.shape.upcast else dtype or tiling.inputs.dtype
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(equation, left, right, precision=tiling.inputs.precision, preferred_element_type=sums)


def scores(
    tiling: Tiling, query: Float[Array, "P R H"], key: Real[Array, "P bk H"], may_attend: Array | None, place: Place
) -> tuple[Scores, "Steps"]:
    """The scores of a tile, -inf where hidden, and what their derivatives need."""
    operands, cap, tanh, capped = tiling.inputs.operands, tiling.inputs.logits_soft_cap, None, None
    score = tiling.as_tile(product(tiling, "prh,pkh->prk", query, key) * tiling.inputs.scale)
    if operands.key_scale is not None:
        score = score * tiling.scales(operands.key_scale, place)
    if cap is not None:
        tanh = jnp.tanh(score / cap)
        score = cap * tanh
    if tiling.inputs.score_fn is not None:
        score, capped = score_function(tiling, place)(score, operands.score_arrays), score
    if operands.bias is not None:
        score = score + tiling.split_heads(tiling.pairs(operands.bias, place)).astype(score.dtype)
    if operands.alibi_slopes is not None:
        score = score - tiling.heads(operands.alibi_slopes, place) * distance(tiling, place)
    return score if may_attend is None else jnp.where(may_attend, score, -jnp.inf), Steps(tanh, capped)


class Steps(NamedTuple):
    """Intermediate values of the scores.

    Attributes:
      tanh: of the soft cap.
      capped: what `score_fn` is applied to.
    """

    tanh: Scores | None
    capped: Scores | None


def slope(tiling: Tiling, place: Place, steps: Steps) -> Scores | None:
    """The derivative of each score with respect to scale * q . k; None is 1."""
    factor = None if steps.tanh is None else 1 - steps.tanh**2
    if steps.capped is None:
        return factor
    function, arrays = score_function(tiling, place), tiling.inputs.operands.score_arrays
    of_function = derivative(lambda score: function(score, arrays), steps.capped)
    return of_function if factor is None else of_function * factor


def score_function(tiling: Tiling, place: Place) -> Callable[[Scores, Any], Scores]:
    """`score_fn` in a tile, as a function of scores and of its floating point arrays."""
    split, size = tiling.inputs.score_fn, tiling.sizes
    assert split is not None
    batch, head = split.batch[place.batch], tiling.query_heads(place).reshape(-1, 1, size.G, 1)
    pairs = masks.of_pairs(tiling.mask_of_row(place), tiling.rows(place), tiling.columns(place))
    query, key = map(tiling.split_heads, pairs)

    def apply(score: Scores, floats: Any) -> Scores:
        score_fn = split.joined(floats)
        return score_fn.function(score, batch, head, query, key, *score_fn.arrays)

    return apply


def d_score_arrays(tiling: Tiling, place: Place, steps: Steps, d_score: Scores) -> tuple[Array, ...]:
    """The gradients of the floating point arrays of `score_fn` from one tile."""
    function, capped = score_function(tiling, place), steps.capped
    assert capped is not None
    _, pull = jax.vjp(lambda floats: function(capped, floats), tiling.inputs.operands.score_arrays)
    return pull(d_score)[0]


def moved_by_score_arrays(tiling: Tiling, place: Place, steps: Steps, tangents: Any) -> Scores:
    """The tangents of the scores from those of the arrays of `score_fn`, of which None is zero."""
    function, capped, arrays = score_function(tiling, place), steps.capped, tiling.inputs.operands.score_arrays
    assert capped is not None
    filled = jax.tree.map(lambda x, dx: jnp.zeros_like(x) if dx is None else dx, arrays, tangents)
    return jax.jvp(lambda floats: function(capped, floats), (arrays,), (filled,))[1]


def distance(tiling: Tiling, place: Place) -> Float[Array, "1 bq 1 bk"]:
    """|query position - key position|."""
    distance = masks.distance(tiling.mask_of_row(place), tiling.rows(place), tiling.columns(place))
    return tiling.split_heads(distance).astype(tiling.inputs.score_dtype)


def drop(tiling: Tiling, weight: Float[Array, "P R bk"], place: Place) -> Float[Array, "P R bk"]:
    """Dropout, of the weights or of their gradients."""
    spec = tiling.inputs.dropout
    if spec is None:
        return weight
    head = tiling.query_heads(place).reshape(-1, 1, tiling.sizes.G, 1)
    row, column = tiling.rows(place)[None, :, None, None], tiling.columns(place)[None, None, None]
    kept = dropout.keep(spec, spec.batch[place.batch], head, row, column)
    return jnp.where(tiling.as_matrix(kept), weight * spec.scale, 0.0)
