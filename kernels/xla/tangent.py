"""The forward-mode derivative in plain XLA: one sweep over the tiles, with memory linear in T and S.

With p the weights and s' the tangents of the scores, the tangent of the log-sum-exp is the mean, sum(p * s'), and that
of the output is sum(p * s' * v) + sum(p * v') - mean * out. A sink is a score with a value of 0.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import row_terms
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.xla.scores import distance, drop, product, scores
from mqa_jax.kernels.xla.tile import Place, Scores, TileShape, Tiling
from mqa_jax.shapes import LogSumExp, Output


class Rows(NamedTuple):
    """Query-side arrays of a tile, `[P, R, ...]`."""

    query: Array
    moved: Array | None  # the tangent of the query
    normalizer: Normalizer


class Sums(NamedTuple):
    """Over the keys visited so far: of p * s' and of p * (s' * v + v')."""

    mean: Float[Array, "P R 1"]
    weighted: Float[Array, "P R V"]


def tangent_in_tiles(
    inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands, shape: TileShape
) -> tuple[Output, LogSumExp]:
    """For each tile of queries, all tiles of keys that it attends to; at most five matrix products a tile."""
    tiling, size = Tiling(inputs, shape), inputs.sizes

    def query_tile(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        place = tiling.place(index // tiling.row_tiles)
        place = tiling.at_row_tile(place, index % tiling.row_tiles)
        place = place._replace(owned_row=place.row)  # rows covered twice are computed twice, with equal results
        moved: Array | None = tangents.query
        rows = Rows(
            tiling.queries(inputs.operands.query, place),
            None if moved is None else tiling.queries(moved, place),
            Normalizer(*(tiling.queries(x[..., None], place) for x in normalizer)),
        )
        zeros = lambda width: jnp.zeros((shape.heads, shape.rows * size.G, width), inputs.score_dtype)
        step = functools.partial(add_tile, tiling, tangents, rows)
        sums = tiling.over_column_tiles(place, step, Sums(zeros(1), zeros(size.V)))
        into_mean, into_weighted = results
        return tiling.store_queries(into_mean, sums.mean, place), tiling.store_queries(
            into_weighted, sums.weighted, place
        )

    zeros = lambda width: jnp.zeros((size.B, size.T, size.K, size.G, width), inputs.score_dtype)
    results = lax.fori_loop(0, tiling.head_blocks * tiling.row_tiles, query_tile, (zeros(1), zeros(size.V)))
    mean, weighted = (x.reshape(size.B, size.T, size.N, -1) for x in results)
    mean = mean[..., 0] + row_terms.moved_by_sinks(inputs.operands.sinks, tangents.sinks, normalizer)
    moved = weighted - mean[..., None] * out.astype(weighted.dtype)
    return moved.astype(inputs.dtype), mean


def add_tile(
    tiling: Tiling, tangents: Operands, rows: Rows, place: Place, may_attend: Array | None, sums: Sums
) -> Sums:
    """Adds one tile of keys."""
    operands = tiling.inputs.operands
    key, value = tiling.keys(operands.key, place), tiling.keys(operands.value, place)
    score, tanh = scores(tiling, rows.query, key, may_attend, place)
    weight = rows.normalizer.weight(tiling.as_matrix(score))
    d_score = moved_scores(tiling, tangents, rows, key, tanh, place)
    mean, weighted = sums
    if d_score is not None:
        by_score = weight * d_score
        mean = mean + jnp.sum(by_score, axis=-1, keepdims=True)
        weighted = weighted + product(tiling, "prk,pkv->prv", drop(tiling, by_score, place), value)
    if tangents.value is not None:
        moved = tiling.keys(tangents.value, place)
        weighted = weighted + product(tiling, "prk,pkv->prv", drop(tiling, weight, place), moved)
    return Sums(mean, weighted)


def moved_scores(
    tiling: Tiling, tangents: Operands, rows: Rows, key: Array, tanh: Scores | None, place: Place
) -> Float[Array, "P R bk"] | None:
    """The tangents of the scores; None where they are zero."""
    left, right = [], []
    if rows.moved is not None:
        left, right = [rows.moved], [key]
    if tangents.key is not None:
        left, right = [*left, rows.query], [*right, tiling.keys(tangents.key, place)]
    terms = []
    if left:  # both products as one, with twice the features
        joined = [jnp.concatenate(parts, axis=-1) for parts in (left, right)]
        d_score = tiling.as_tile(product(tiling, "prh,pkh->prk", *joined)) * tiling.inputs.scale
        terms.append(d_score if tanh is None else d_score * (1 - tanh**2))
    if tangents.bias is not None:
        terms.append(tiling.split_heads(tiling.pairs(tangents.bias, place)).astype(tiling.inputs.score_dtype))
    if tangents.alibi_slopes is not None:
        terms.append(-tiling.heads(tangents.alibi_slopes, place) * distance(tiling, place))
    if not terms:
        return None
    shape = tiling.shape.heads, tiling.shape.rows, tiling.sizes.G, tiling.shape.columns
    return tiling.as_matrix(jnp.broadcast_to(sum(terms[1:], start=terms[0]), shape))
