"""The forward pass as a Triton kernel: FlashAttention-2 (arXiv 2307.08691), algorithm 1, one program a tile of queries.

The running softmax is in base 2 with the scale folded into the exponential. One loop computes the tiles that need no
mask, a second loop the others.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import online_softmax, tile_bounds
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.tiles import Index
from mqa_jax.kernels.triton.call import kernel_call
from mqa_jax.kernels.triton.grid import Visits, over_query_tiles
from mqa_jax.kernels.triton.io import (
    Pieces,
    load_head_numbers,
    load_keys,
    load_queries,
    load_scales,
    store_row_numbers,
    store_rows,
    zeros,
)
from mqa_jax.kernels.triton.products import dot, product
from mqa_jax.kernels.triton.program import Place, Program
from mqa_jax.kernels.triton.scores import drop, exp_of_difference, score_unit, scores, weights
from mqa_jax.kernels.triton.tile_config import TileConfig
from mqa_jax.shapes import Output


def forward_kernel(inputs: Inputs, config: TileConfig, interpret: bool) -> tuple[Output, Normalizer]:
    size = inputs.sizes
    grid, place_of_program = over_query_tiles(inputs, config)

    def kernel(inputs: Inputs, bounds: Any, out: Any, normalizer: Any) -> None:
        batch, head, tile = place_of_program()
        program, row = Program(inputs, config, interpret, batch, head), tile * config.rows
        visits = Visits.load(program, bounds, tile)
        state = attend(program, row, visits, ((0, visits.full), (0, visits.masked)))
        finish(program, state, row, out, normalizer)

    number: Any = jax.ShapeDtypeStruct((size.B, size.N, size.T), jnp.float32)
    shapes = jax.ShapeDtypeStruct((size.B, size.T, size.N, size.V), inputs.out_dtype), Normalizer(number, number)
    bounds = tile_bounds.key_tiles(inputs.mask, size, config.rows, config.columns)
    run = kernel_call("mqa_forward", kernel, grid, config, shapes, interpret)
    out, normalizer = run(inputs, bounds)
    return out, jax.tree.map(lambda x: x.swapaxes(1, 2), normalizer)


Loops = tuple[tuple[Index, Index], tuple[Index, Index]]  # first and last + 1 of the steps


class State(NamedTuple):
    """A running softmax (see `online_softmax.State`), and the weights whose product with the values is deferred."""

    highest: Float[Array, " bq"]  # of scores / score_unit
    total: Float[Array, " bq"]
    weighted: Pieces
    deferred: Array | None  # [bq, bk]


def attend(program: Program, row: Array, visits: Visits, loops: Loops) -> State:
    """The running softmax of a tile of queries over the steps of two loops: tiles without mask, and with it."""
    config, inputs, operands = program.config, program.inputs, program.inputs.operands
    query = load_queries(program, operands.query, row, masked=True)

    def step(number: Index, state: State, masked: bool) -> State:
        place = Place(row, visits.tile(number, masked) * config.columns)
        raw = dot(inputs, query, load_keys(program, operands.key, place.column, masked))
        score, _ = scores(program, raw, place, masked)
        highest = jnp.maximum(state.highest, jnp.max(score, axis=1))
        shift = online_softmax.finite(highest)
        weight = weights(program, score, shift[:, None])
        rescale = exp_of_difference(program, state.highest, shift)
        total = state.total * rescale + jnp.sum(weight, axis=1)
        dropped = drop(program, weight, place)
        if operands.value_scale is not None:
            dropped = dropped * load_scales(program, operands.value_scale, place.column, masked)
        dropped = dropped.astype(inputs.weight_dtype)
        weighted = state.weighted
        if state.deferred is None:
            value = load_keys(program, operands.value, place.column, masked)
            weighted = tuple(x * rescale[:, None] + product(inputs, dropped, v) for x, v in zip(weighted, value))
            return State(highest, total, weighted, None)
        weighted = add_deferred(state.weighted, state.deferred, visits.previous(number, masked), masked)
        return State(highest, total, tuple(x * rescale[:, None] for x in weighted), dropped)

    def add_deferred(weighted: Pieces, deferred: Array, tile: Array, masked: bool) -> Pieces:
        value = load_keys(program, operands.value, tile * config.columns, masked)
        return tuple(x + product(inputs, deferred, v) for x, v in zip(weighted, value))

    state = empty(program)
    state = lax.fori_loop(*loops[0], lambda number, state: step(number, state, masked=False), state)
    if visits.any_masked:
        state = lax.fori_loop(*loops[1], lambda number, state: step(number, state, masked=True), state)
    if state.deferred is not None:
        state = state._replace(weighted=add_deferred(state.weighted, state.deferred, visits.last(), masked=True))
    return state


def empty(program: Program) -> State:
    config, inputs = program.config, program.inputs
    full = lambda *shape, value=0.0: jnp.full(shape, value, jnp.float32)
    weighted = zeros(config.rows, program.sizes.V, config)
    deferred = jnp.zeros((config.rows, config.columns), inputs.weight_dtype) if config.defer_values else None
    return State(full(config.rows, value=-jnp.inf), full(config.rows), weighted, deferred)


def finish(program: Program, state: State, row: Array, out: Any, normalizer: Any, *leading: Array) -> None:
    """Divides, with the sink in the denominator, and writes; 0 and -inf in empty rows and in padding."""
    highest, sink = (state.highest * score_unit(program.inputs))[:, None], program.inputs.operands.sinks
    seen = highest > -jnp.inf
    if sink is not None:
        sink = jnp.broadcast_to(load_head_numbers(program, sink, row), highest.shape)
        for part in leading:  # only the first part of the keys has the sink
            sink = jnp.where(part == 0, sink, -jnp.inf)
    # With a single feature of 1: the result is the factor that normalizes all features.
    one = online_softmax.State(highest, state.total[:, None], jnp.ones_like(highest))
    factor, result = online_softmax.finish(one, sink)
    if program.inputs.mask.query_lengths is not None:
        exists = program.rows(Place(row, row)) < program.row_limit()
        seen, result = seen & exists, result._replace(highest=jnp.where(exists, result.highest, -jnp.inf))
    store_rows(program, out, tuple(jnp.where(seen, x * factor, 0.0) for x in state.weighted), row, *leading)
    for into, numbers in zip(normalizer, result):
        store_row_numbers(program, into, numbers[:, 0], row, *leading)
