"""The tangents of output and log-sum-exp (forward mode) as a Triton kernel, one program a tile of queries.

With weights p and scores s, and x' for the tangent of x (`drop` is dropout, L the log-sum-exp):

    L'   = sum_keys p s'
    out' = sum_keys drop(p) (s' v + v') - L' out

The weights are recomputed, as in the backward pass: the loop is that of dQ, with five matrix products. A product with
an operand whose tangent is 0 is left out.
"""

import functools
import operator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import row_terms, tile_bounds
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.tiles import Index
from mqa_jax.kernels.triton.call import kernel_call
from mqa_jax.kernels.triton.grid import Visits, over_query_tiles
from mqa_jax.kernels.triton.io import (
    Pieces,
    load_head_numbers,
    load_keys,
    load_queries,
    load_row_numbers,
    store_row_numbers,
    store_rows,
    zeros,
)
from mqa_jax.kernels.triton.mask import distance
from mqa_jax.kernels.triton.pairs import load_pairs
from mqa_jax.kernels.triton.products import dot, product
from mqa_jax.kernels.triton.program import Place, Program
from mqa_jax.kernels.triton.scores import Scores, drop, load_normalizer, scores, weights
from mqa_jax.kernels.triton.tile_config import TileConfig
from mqa_jax.shapes import LogSumExp, Output


class Saved(NamedTuple):
    """Query-side arrays that the forward pass has computed, and what the sinks add to the log-sum-exp's tangent."""

    out: Any  # [B, T, N, V]
    normalizer: Normalizer  # float32 [B, N, T]
    of_sinks: Any  # the same, or None


class Sums(NamedTuple):
    """Over the keys visited so far."""

    d_log_sum_exp: Float[Array, " bq"]
    d_out: Pieces


def tangent_kernel(
    inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands, config: TileConfig, interpret: bool
) -> tuple[Output, LogSumExp]:
    size, sinks = inputs.sizes, inputs.operands.sinks
    of_sinks = None
    if sinks is not None and tangents.sinks is not None:
        of_sinks = row_terms.moved_by_sinks(sinks, tangents.sinks, normalizer)
    grid, place_of_program = over_query_tiles(inputs, config)

    def kernel(inputs: Inputs, tangents: Operands, saved: Saved, bounds: Any, d_out: Any, d_log_sum_exp: Any) -> None:
        batch, head, tile = place_of_program()
        program = Program(inputs, config, interpret, batch, head)
        _one_tile(program, tangents, saved, tile, bounds, (d_out, d_log_sum_exp))

    shapes = out, jax.ShapeDtypeStruct((size.B, size.N, size.T), jnp.float32)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    bounds = tile_bounds.key_tiles(inputs.mask, size, config.rows, config.columns)
    saved = Saved(out, *jax.tree.map(lambda x: x.swapaxes(1, 2), (normalizer, of_sinks)))
    run = kernel_call("mqa_tangent", kernel, grid, config, shapes, interpret)
    d_out, d_log_sum_exp = run(inputs, replace(tangents, sinks=None), saved, bounds)
    return d_out, d_log_sum_exp.swapaxes(1, 2)


def _one_tile(
    program: Program, tangents: Operands, saved: Saved, tile: Array, bounds: Any, into: tuple[Any, Any]
) -> None:
    config, inputs, operands = program.config, program.inputs, program.inputs.operands
    row = tile * config.rows
    query, d_query = (_loaded(load_queries, program, x, row, True) for x in (operands.query, tangents.query))
    highest, log_total = (x[:, None] for x in load_normalizer(program, saved.normalizer, row, masked=True))
    visits = Visits.load(program, bounds, tile)

    def step(number: Index, sums: Sums, masked: bool) -> Sums:
        place = Place(row, visits.tile(number, masked) * config.columns)
        key, d_key = (_loaded(load_keys, program, x, place.column, masked) for x in (operands.key, tangents.key))
        raw = dot(inputs, query, key)
        sides: Any = ((d_query, key), (query, d_key))
        # Before the exponentials, so that they overlap with the tensor cores.
        d_raw = _sum(dot(inputs, *pair) for pair in sides if all(side is not None for side in pair))
        score, tanh = scores(program, raw, place, masked)
        weight = weights(program, score, highest, log_total)
        d_score = _d_score(program, tangents, d_raw, tanh, place, masked)
        dropped = drop(program, weight, place)
        d_log_sum_exp, d_out = sums
        if d_score is not None:
            d_log_sum_exp = d_log_sum_exp + jnp.sum(weight * d_score, axis=1)
            value = load_keys(program, operands.value, place.column, masked)
            d_out = _added(program, d_out, dropped * d_score, value)
        if tangents.value is not None:
            d_value = load_keys(program, tangents.value, place.column, masked)
            d_out = _added(program, d_out, dropped, d_value)
        return Sums(d_log_sum_exp, d_out)

    sums = Sums(_d_log_sum_exp_of_sinks(program, saved, row), zeros(config.rows, program.sizes.V, config))
    sums = lax.fori_loop(0, visits.full, lambda number, sums: step(number, sums, masked=False), sums)
    if visits.any_masked:
        sums = lax.fori_loop(0, visits.masked, lambda number, sums: step(number, sums, masked=True), sums)
    out = load_queries(program, saved.out, row, masked=True)
    d_out = tuple(x - sums.d_log_sum_exp[:, None] * y.astype(jnp.float32) for x, y in zip(sums.d_out, out))
    store_rows(program, into[0], d_out, row)
    store_row_numbers(program, into[1], sums.d_log_sum_exp, row)


def _d_score(
    program: Program, tangents: Operands, d_raw: Scores | None, tanh: Scores | None, place: Place, masked: bool
) -> Scores | None:
    """The tangent of the scores, from that of q . k; None if it is 0. It may broadcast against a tile of scores."""
    terms = []
    if d_raw is not None:
        d_raw = d_raw * program.inputs.scale
        terms.append(d_raw if tanh is None else d_raw * (1 - tanh * tanh))
    if tangents.bias is not None:
        terms.append(load_pairs(program, tangents.bias, place, masked).astype(jnp.float32))
    if tangents.alibi_slopes is not None:
        slope = load_head_numbers(program, tangents.alibi_slopes, place.row)
        terms.append(-slope * distance(program, place))
    return _sum(terms)


def _d_log_sum_exp_of_sinks(program: Program, saved: Saved, row: Array) -> Float[Array, " bq"]:
    if saved.of_sinks is None:
        return jnp.zeros(program.config.rows, jnp.float32)
    return load_row_numbers(program, saved.of_sinks, row, masked=True)


def _added(program: Program, sums: Pieces, weight: Scores, value: Pieces) -> Pieces:
    weight = weight.astype(program.inputs.dtype)
    return tuple(x + product(program.inputs, weight, v) for x, v in zip(sums, value))


def _loaded(load: Any, program: Program, x: Any, start: Array, masked: bool) -> Any:
    """Pieces; None where there is no array."""
    return None if x is None else load(program, x, start, masked)


def _sum(terms: Any) -> Scores | None:
    found = list(terms)
    return functools.reduce(operator.add, found) if found else None
