"""The backward pass in plain XLA: FlashAttention-2 (arXiv 2307.08691), algorithm 2, one sweep over the tiles.

With p the weights and D = sum(d_out * out) - d_log_sum_exp per row, the gradient of a score is p * (d_out . v - D).
dK and dV are summed over the G heads of a group by the matrix products themselves: the heads are rows of the tile.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import row_terms
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.xla.scores import Steps, d_score_arrays, distance, drop, product, scores, slope
from mqa_jax.kernels.xla.tile import ZERO, Place, Scores, TileShape, Tiling
from mqa_jax.shapes import LogSumExp, Output


class Saved(NamedTuple):
    """Query-side arrays that every tile reads, `[B, T, N, ...]`."""

    query: Array
    d_out: Array
    highest: Array
    log_total: Array
    delta: Array


class Sums(NamedTuple):
    """Partial sums of the gradients over the tiles, in `score_dtype`."""

    query: Float[Array, "B T K G H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K V"]
    bias: Float[Array, "#B #N #T #S"] | None
    alibi_slopes: Float[Array, "K G"] | None
    score_arrays: tuple[Float[Array, "..."], ...] | None

    @classmethod
    def zeros(cls, inputs: Inputs) -> "Sums":
        operands, size = inputs.operands, inputs.sizes
        bias = operands.bias if inputs.needs_gradient("bias") else None
        zeros = lambda *shape: jnp.zeros(shape, inputs.score_dtype)
        return cls(
            zeros(size.B, size.T, size.K, size.G, size.H),
            zeros(*operands.key.shape),
            zeros(*operands.value.shape),
            None if bias is None else zeros(*bias.shape),
            zeros(size.K, size.G) if inputs.needs_gradient("alibi_slopes") else None,
            jax.tree.map(jnp.zeros_like, operands.score_arrays) if inputs.needs_gradient("score_arrays") else None,
        )


def backward_in_tiles(
    inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp, shape: TileShape
) -> Operands:
    """For each tile of keys, all tiles of queries that attend to it; five matrix products a tile."""
    tiling, operands = Tiling(inputs, shape), inputs.operands
    delta = row_terms.delta(out, d_out, d_log_sum_exp)
    saved = Saved(operands.query, d_out, *(x[..., None] for x in (*normalizer, delta)))

    def key_tile(index: Array, sums: Sums) -> Sums:
        place = tiling.place(index // tiling.column_tiles)
        place = tiling.at_column_tile(place, index % tiling.column_tiles)
        key, value = tiling.keys(operands.key, place), tiling.keys(operands.value, place)

        zeros = tuple(jnp.zeros(x.shape, inputs.score_dtype) for x in (key, value))
        step = functools.partial(differentiate, tiling, saved, key, value)
        sums, d_key, d_value = tiling.over_row_tiles(place, step, (sums, zeros[0], zeros[1]))
        return sums._replace(
            key=tiling.add_keys(sums.key, d_key, place), value=tiling.add_keys(sums.value, d_value, place)
        )

    sums = lax.fori_loop(0, tiling.head_blocks * tiling.column_tiles, key_tile, Sums.zeros(inputs))
    return gradients(inputs, sums, normalizer, delta)


def differentiate(
    tiling: Tiling,
    saved: Saved,
    key: Float[Array, "P bk H"],
    value: Float[Array, "P bk V"],
    place: Place,
    may_attend: Array | None,
    carry: tuple[Sums, Array, Array],
) -> tuple[Sums, Array, Array]:
    """Adds the contributions of one tile to every gradient."""
    sums, d_key, d_value = carry
    rows = Saved(*(tiling.queries(x, place) for x in saved))
    weight, d_score, steps = d_scores(tiling, rows, key, value, place, may_attend)
    d_value = d_value + product(tiling, "prk,prv->pkv", drop(tiling, weight, place), rows.d_out)
    sums = add_to_score_terms(tiling, place, steps, tiling.as_tile(d_score), sums)
    factor = slope(tiling, place, steps)
    if factor is not None:
        d_score = d_score * tiling.as_matrix(factor)
    d_score = d_score * tiling.inputs.scale
    d_key = d_key + product(tiling, "prk,prh->pkh", d_score, rows.query)
    d_query = product(tiling, "prk,pkh->prh", d_score, key)
    return sums._replace(query=tiling.add_queries(sums.query, d_query, place)), d_key, d_value


def d_scores(
    tiling: Tiling,
    rows: Saved,
    key: Float[Array, "P bk H"],
    value: Float[Array, "P bk V"],
    place: Place,
    may_attend: Array | None,
) -> tuple[Float[Array, "P R bk"], Float[Array, "P R bk"], Steps]:
    """The weights of a tile, the gradients of its scores, and what the derivatives of the scores need."""
    score, steps = scores(tiling, rows.query, key, may_attend, place)
    weight = Normalizer(rows.highest, rows.log_total).weight(tiling.as_matrix(score))
    d_weight = drop(tiling, product(tiling, "prv,pkv->prk", rows.d_out, value), place)
    return weight, weight * (d_weight - rows.delta), steps


def score_arrays_in_tiles(
    inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp, shape: TileShape
) -> tuple[Array, ...]:
    """The gradients of the arrays of `score_fn` and nothing else: two matrix products a tile."""
    tiling, operands = Tiling(inputs, shape), inputs.operands
    delta = row_terms.delta(out, d_out, d_log_sum_exp)
    saved = Saved(operands.query, d_out, *(x[..., None] for x in (*normalizer, delta)))
    Sum = tuple[Array, ...]

    def key_tile(index: Array, sums: Sum) -> Sum:
        place = tiling.place(index // tiling.column_tiles)
        place = tiling.at_column_tile(place, index % tiling.column_tiles)
        key, value = tiling.keys(operands.key, place), tiling.keys(operands.value, place)

        def step(place: Place, may_attend: Array | None, sums: Sum) -> Sum:
            rows = Saved(*(tiling.queries(x, place) for x in saved))
            _, d_score, steps = d_scores(tiling, rows, key, value, place, may_attend)
            return jax.tree.map(jnp.add, sums, d_score_arrays(tiling, place, steps, tiling.as_tile(d_score)))

        return tiling.over_row_tiles(place, step, sums)

    zeros = jax.tree.map(jnp.zeros_like, operands.score_arrays)
    return lax.fori_loop(0, tiling.head_blocks * tiling.column_tiles, key_tile, zeros)


def add_to_score_terms(tiling: Tiling, place: Place, steps: Steps, d_score: Scores, sums: Sums) -> Sums:
    """The gradients of what changes the scores: bias, ALiBi slopes, and the arrays of `score_fn`."""
    if sums.score_arrays is not None:
        added = d_score_arrays(tiling, place, steps, d_score)
        sums = sums._replace(score_arrays=jax.tree.map(jnp.add, sums.score_arrays, added))
    if sums.bias is not None:
        sums = sums._replace(bias=tiling.add_pairs(sums.bias, d_score, place))
    if sums.alibi_slopes is not None:
        slopes = -jnp.sum(d_score * distance(tiling, place), axis=(1, 3))  # [P, G]
        start = place.head, ZERO
        slopes = lax.dynamic_slice(sums.alibi_slopes, start, slopes.shape) + slopes
        sums = sums._replace(alibi_slopes=lax.dynamic_update_slice(sums.alibi_slopes, slopes, start))
    return sums


def gradients(inputs: Inputs, sums: Sums, normalizer: Normalizer, delta: Float[Array, "B T N"]) -> Operands:
    """The sums, in the shapes of the operands."""
    operands = inputs.operands

    def like(x: Array | None, operand: Array | None) -> Any:
        if x is None or operand is None:
            return None
        return x.reshape(operand.shape).astype(inputs.dtype_of_gradient(operand))

    return Operands(
        query=like(sums.query, operands.query),
        key=like(sums.key, operands.key),
        value=like(sums.value, operands.value),
        bias=like(sums.bias, operands.bias),
        score_arrays=sums.score_arrays,
        alibi_slopes=like(sums.alibi_slopes, operands.alibi_slopes),
        sinks=like(row_terms.d_sinks(operands.sinks, normalizer, delta), operands.sinks),
    )
