"""The forward-mode derivative in plain XLA: one sweep over the tiles, with memory linear in T and S.

With p the weights and s' the tangents of the scores, the tangent of the log-sum-exp is the mean, sum(p * s'), and that
of the output is sum(p * s' * v) + sum(p * v') - mean * out. A sink is a score with a value of 0.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import row_terms
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.xla.scores import Steps, distance, drop, moved_by_score_arrays, product, scores, slope
from mqa_jax.kernels.xla.tile import Place, TileShape, Tiling
from mqa_jax.shapes import LogSumExp, Output


class Rows(NamedTuple):
    """Query-side arrays of a tile, `[P, R, ...]`."""

    query: Array
    moving: Array | None  # the factors of the moved keys: [tangent of the query, query], of which either may be absent
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
        query = tiling.queries(inputs.operands.query, place)
        moved = None if tangents.query is None else tiling.queries(tangents.query, place)
        moving = side_by_side(moved, None if tangents.key is None else query)
        rows = Rows(query, moving, Normalizer(*(tiling.queries(x[..., None], place) for x in normalizer)))
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
    return moved.astype(inputs.out_dtype), mean


def add_tile(
    tiling: Tiling, tangents: Operands, rows: Rows, place: Place, may_attend: Array | None, sums: Sums
) -> Sums:
    """Adds one tile of keys."""
    operands = tiling.inputs.operands
    key, value = tiling.keys(operands.key, place), tiling.keys(operands.value, place)
    score, steps = scores(tiling, rows.query, key, may_attend, place)
    weight = rows.normalizer.weight(tiling.as_matrix(score))
    d_score = moved_scores(tiling, tangents, rows, key, steps, may_attend, place)
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
    tiling: Tiling,
    tangents: Operands,
    rows: Rows,
    key: Array,
    steps: Steps,
    may_attend: Array | None,
    place: Place,
) -> Float[Array, "P R bk"] | None:
    """The tangents of the scores; None where they are zero. What is hidden may hold anything, as in `scores`."""
    terms = []
    if rows.moving is not None:  # both products as one, with twice the features
        moved = None if tangents.key is None else tiling.keys(tangents.key, place)
        keys = side_by_side(None if tangents.query is None else key, moved)
        d_score = tiling.as_tile(product(tiling, "prh,pkh->prk", rows.moving, keys)) * tiling.inputs.scale
        factor = slope(tiling, place, steps)
        terms.append(d_score if factor is None else d_score * factor)
    if any(x is not None for x in tangents.score_arrays or ()):
        terms.append(moved_by_score_arrays(tiling, place, steps, tangents.score_arrays))
    if tangents.bias is not None:
        terms.append(tiling.split_heads(tiling.pairs(tangents.bias, place)).astype(tiling.inputs.score_dtype))
    if tangents.alibi_slopes is not None:
        terms.append(-tiling.heads(tangents.alibi_slopes, place) * distance(tiling, place))
    if not terms:
        return None
    total = sum(terms[1:], start=terms[0])
    if may_attend is not None:
        total = jnp.where(may_attend, total, 0.0)
    shape = tiling.shape.heads, tiling.shape.rows, tiling.sizes.G, tiling.shape.columns
    return tiling.as_matrix(jnp.broadcast_to(total, shape))


def side_by_side(*arrays: Array | None) -> Any:
    """The features of those that are there; None if none is."""
    there = [x for x in arrays if x is not None]
    return jnp.concatenate(there, axis=-1) if there else None
