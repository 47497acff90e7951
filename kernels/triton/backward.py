"""The backward pass as Triton kernels: FlashAttention-2 (arXiv 2307.08691), algorithm 2, as two kernels.

One kernel writes dQ, one writes dK and dV; each recomputes the weights (seven matrix products instead of five). So each
entry is written once, by one program, in a fixed order: no atomics, bitwise reproducible. The gradients of the terms
that are added to the scores are in `score_gradient`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import tile_bounds
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.tiles import Index
from mqa_jax.kernels.triton.call import divided, kernel_call, settled
from mqa_jax.kernels.triton.grid import Share, Visits, over_key_tiles, over_query_tiles
from mqa_jax.kernels.triton.io import (
    Pieces,
    load_keys,
    load_queries,
    load_row_numbers,
    store_columns,
    store_rows,
    zeros,
)
from mqa_jax.kernels.triton.products import dot, product
from mqa_jax.kernels.triton.program import Place, Program
from mqa_jax.kernels.triton.scores import Scores, drop, load_normalizer, scores, times_slope, weights
from mqa_jax.kernels.triton.tile_config import TileConfig


class Saved(NamedTuple):
    """Query-side arrays of the backward pass."""

    d_out: Any  # [B, T, N, V]
    highest: Any  # float32 [B, N, T]: with log_total, the denominator of the weights
    log_total: Any
    delta: Any  # float32 [B, N, T], sum(d_out * out) - d_log_sum_exp


class Rows(NamedTuple):
    """One tile of queries and of the arrays saved for them."""

    query: Pieces
    d_out: Pieces
    highest: Array  # in units of scores, +inf in empty rows; these three broadcast against a tile of scores
    log_total: Array
    delta: Array

    @classmethod
    def load(cls, program: Program, saved: Saved, row: Array, masked: bool) -> "Rows":
        highest, log_total = load_normalizer(program, Normalizer(saved.highest, saved.log_total), row, masked)
        delta = load_row_numbers(program, saved.delta, row, masked)
        along = (lambda x: x[None]) if program.transposed else (lambda x: x[:, None])
        query = load_queries(program, program.inputs.operands.query, row, masked)
        d_out = load_queries(program, saved.d_out, row, masked)
        return cls(query, d_out, *(along(x) for x in (highest, log_total, delta)))


def d_scores(
    program: Program, rows: Rows, key: Pieces, value: Pieces, place: Place, masked: bool
) -> tuple[Scores, Scores, Scores]:
    """The weights, and the gradients of the scores (for added terms) and of scale * q . k."""
    in_order = lambda of_rows, of_columns: (of_columns, of_rows) if program.transposed else (of_rows, of_columns)
    raw = dot(program.inputs, *in_order(rows.query, key))
    # Before the exponentials, so that they overlap with the tensor cores.
    d_weight = dot(program.inputs, *in_order(rows.d_out, value))
    score, steps = scores(program, raw, place, masked)
    weight = weights(program, score, rows.highest, rows.log_total)
    d_score = weight * (drop(program, d_weight, place) - rows.delta)
    return weight, d_score, times_slope(d_score, steps)


def d_query(inputs: Inputs, saved: Saved, config: TileConfig, interpret: bool) -> Float[Array, "B T N H"]:
    size = inputs.sizes
    grid, place_of_program = over_query_tiles(inputs, config)

    def kernel(inputs: Inputs, saved: Saved, bounds: Any, out: Any) -> None:
        batch, head, tile = place_of_program()
        _one_tile_of_d_query(Program(inputs, config, interpret, batch, head), saved, tile, bounds, out)

    shape = jax.ShapeDtypeStruct(inputs.operands.query.shape, inputs.out_dtype)
    bounds = tile_bounds.key_tiles(inputs.mask, size, config.rows, config.columns)
    return kernel_call("mqa_dq", kernel, grid, config, shape, interpret)(inputs, saved, bounds)


def _one_tile_of_d_query(program: Program, saved: Saved, tile: Array, bounds: Any, out: Any) -> None:
    config, inputs, operands = program.config, program.inputs, program.inputs.operands
    row = tile * config.rows
    rows = Rows.load(program, saved, row, masked=True)
    visits = Visits.load(program, bounds, tile)

    def step(number: Index, total: Pieces, masked: bool) -> Pieces:
        place = Place(row, visits.tile(number, masked) * config.columns)
        key = load_keys(program, operands.key, place.column, masked)
        value = load_keys(program, operands.value, place.column, masked)
        _, _, d_score = d_scores(program, rows, key, value, place, masked)
        d_score = d_score.astype(inputs.dtype)
        return tuple(x + product(inputs, d_score, k) for x, k in zip(total, key))

    total = zeros(config.rows, program.sizes.H, config)
    total = lax.fori_loop(0, visits.full, lambda number, total: step(number, total, masked=False), total)
    if visits.any_masked:
        total = lax.fori_loop(0, visits.masked, lambda number, total: step(number, total, masked=True), total)
    store_rows(program, out, tuple(x * inputs.scale for x in total), row)


def d_key_and_value(
    inputs: Inputs, saved: Saved, config: TileConfig, interpret: bool
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Summed over the query heads of each key/value head in float32, inside the kernel.

    With few key/value heads there are too few tiles of keys to fill a GPU. Then several programs share a tile, each for
    a part of the query heads and tiles, and their float32 sums are added up afterwards.
    """
    size = inputs.sizes
    grid, shares, place_of_program = over_key_tiles(inputs, config)

    def kernel(inputs: Inputs, saved: Saved, bounds: Any, d_key: Any, d_value: Any) -> None:
        batch, kv_head, share, tile = place_of_program()
        program = Program(inputs, config, interpret, batch, kv_head * size.G, transposed=True)
        _one_tile_of_d_key(program, saved, tile, Share(share, shares), bounds, (d_key, d_value))

    shape = lambda x: jax.ShapeDtypeStruct((shares, *x.shape), inputs.out_dtype if shares == 1 else jnp.float32)
    shapes = shape(inputs.operands.key), shape(inputs.operands.value)
    bounds = tile_bounds.row_tiles(inputs.mask, size, config.rows, config.columns)
    sums = kernel_call("mqa_dkv", kernel, grid, config, shapes, interpret)(inputs, saved, bounds)
    d_key, d_value = (x[0] if shares == 1 else jnp.sum(x, axis=0).astype(inputs.out_dtype) for x in sums)
    return d_key, d_value


def _one_tile_of_d_key(
    program: Program, saved: Saved, tile: Array, share: Share, bounds: Any, out: tuple[Any, Any]
) -> None:
    config, inputs, operands, size = program.config, program.inputs, program.inputs.operands, program.sizes
    column = tile * config.columns
    key = load_keys(program, operands.key, column, masked=True)
    value = load_keys(program, operands.value, column, masked=True)
    visits = Visits.load(program, bounds, tile)
    settle = lambda sums: tuple(settled(x, program.interpret) for x in sums)

    def loop(total: tuple[Pieces, Pieces], masked: bool) -> tuple[Pieces, Pieces]:
        """One loop over query heads and tiles of queries, so that loads are pipelined across heads."""
        tiles = visits.masked if masked else visits.full

        def step(number: Index, total: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
            head, turn = divided(number, jnp.maximum(tiles, 1))
            one = program.of_head(program.batch, program.head + head)
            place = Place(visits.tile(turn, masked) * config.rows, column)
            rows = Rows.load(one, saved, place.row, masked)
            weight, _, d_score = d_scores(one, rows, key, value, place, masked)
            weight, d_score = (x.astype(inputs.dtype) for x in (drop(one, weight, place), d_score))
            d_value = tuple(x + product(inputs, weight, d) for x, d in zip(total[1], rows.d_out))
            d_key = tuple(x + product(inputs, d_score, q) for x, q in zip(total[0], rows.query))
            return (settle(d_key), settle(d_value)) if config.settle_sums else (d_key, d_value)

        return lax.fori_loop(*share.range(tiles * size.G), step, total)

    total = zeros(config.columns, size.H, config), zeros(config.columns, size.V, config)
    total = loop(total, masked=False)
    if visits.any_masked:
        total = loop(total, masked=True)
    d_key, d_value = total
    d_key = tuple(x * inputs.scale for x in d_key)
    if inputs.mask.key_lengths is not None:  # in padding the sums are undefined
        exists = program.columns(Place(column, column)) < program.column_limit()
        d_key, d_value = (tuple(jnp.where(exists, x, 0.0) for x in y) for y in (d_key, d_value))
    for into, values in zip(out, (d_key, d_value)):
        store_columns(program, into, values, column, share.number)
