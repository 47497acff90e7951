"""The forward pass as a Triton kernel: FlashAttention-2 (arXiv 2307.08691), algorithm 1, one program a tile of queries.

The running softmax is in base 2 with the scale folded into the exponential. Tiles that need no masking come first, then
the others, each in a loop of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import online_softmax, tile_bounds, triton_call
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.tile_config import TileConfig
from mqa_jax.kernels.tiles import Index
from mqa_jax.kernels.triton_grid import KeyTiles, over_query_tiles
from mqa_jax.kernels.triton_tile import Pieces, Place, Program, zeros
from mqa_jax.shapes import Output


def forward(inputs: Inputs, config: TileConfig, interpret: bool) -> tuple[Output, Normalizer]:
    size = inputs.sizes
    grid, place_of_program = over_query_tiles(inputs, config)

    def kernel(inputs: Inputs, bounds: Any, out: Any, normalizer: Any) -> None:
        batch, head, tile = place_of_program()
        program, row = Program(inputs, config, interpret, batch, head), tile * config.rows
        key_tiles = KeyTiles.load(program, bounds, tile)
        state = attend(program, row, key_tiles, ((0, key_tiles.full), (0, key_tiles.masked)))
        finish(program, state, row, out, normalizer)

    number: Any = jax.ShapeDtypeStruct((size.B, size.N, size.T), jnp.float32)
    shapes = jax.ShapeDtypeStruct((size.B, size.T, size.N, size.V), inputs.dtype), Normalizer(number, number)
    bounds = tile_bounds.key_tiles(inputs.mask, size, config.rows, config.columns)
    run = triton_call.call("mqa_forward", kernel, grid, config, shapes, interpret)
    out, normalizer = run(inputs, bounds)
    return out, jax.tree.map(lambda x: x.swapaxes(1, 2), normalizer)


Loops = tuple[tuple[Index, Index], tuple[Index, Index]]  # first and last + 1 of the steps


class State(NamedTuple):
    """A running softmax (see `online_softmax.State`), and the weights whose product with the values is still due."""

    highest: Float[Array, " bq"]  # of scores / unit
    total: Float[Array, " bq"]
    weighted: Pieces
    due: Array | None  # [bq, bk]


def attend(program: Program, row: Array, key_tiles: KeyTiles, loops: Loops) -> State:
    """The running softmax of a tile of queries over the steps of two loops: tiles without mask, and with it."""
    config, operands = program.config, program.inputs.operands
    query = program.queries(operands.query, row, masked=True)

    def step(number: Index, state: State, masked: bool) -> State:
        place = Place(row, key_tiles.number(number, masked) * config.columns)
        raw = program.dot(query, program.keys(operands.key, place.column, masked))
        score, _ = program.scores(raw, place, masked)
        highest = jnp.maximum(state.highest, jnp.max(score, axis=1))
        shift = online_softmax.finite(highest)
        weight = program.weights(score, shift[:, None])
        rescale = program.exp_of_difference(state.highest, shift)
        total = state.total * rescale + jnp.sum(weight, axis=1)
        dropped = program.drop(weight, place)
        if operands.value_scale is not None:
            dropped = dropped * program.scales(operands.value_scale, place.column, masked)
        dropped = dropped.astype(program.inputs.weight_dtype)
        weighted = state.weighted
        if state.due is None:
            value = program.keys(operands.value, place.column, masked)
            weighted = tuple(x * rescale[:, None] + program.product(dropped, v) for x, v in zip(weighted, value))
            return State(highest, total, weighted, None)
        weighted = add_due(state.weighted, state.due, key_tiles.previous(number, masked), masked)
        return State(highest, total, tuple(x * rescale[:, None] for x in weighted), dropped)

    def add_due(weighted: Pieces, due: Array, tile: Array, masked: bool) -> Pieces:
        value = program.keys(operands.value, tile * config.columns, masked)
        return tuple(x + program.product(due, v) for x, v in zip(weighted, value))

    state = empty(program)
    state = lax.fori_loop(*loops[0], lambda number, state: step(number, state, masked=False), state)
    if key_tiles.some_masked:
        state = lax.fori_loop(*loops[1], lambda number, state: step(number, state, masked=True), state)
    if state.due is not None:
        state = state._replace(weighted=add_due(state.weighted, state.due, key_tiles.last(), masked=True))
    return state


def empty(program: Program) -> State:
    config, inputs = program.config, program.inputs
    full = lambda *shape, value=0.0: jnp.full(shape, value, jnp.float32)
    weighted = zeros(config.rows, program.sizes.V, config)
    due = jnp.zeros((config.rows, config.columns), inputs.weight_dtype) if config.defer_values else None
    return State(full(config.rows, value=-jnp.inf), full(config.rows), weighted, due)


def finish(program: Program, state: State, row: Array, out: Any, normalizer: Any, *leading: Array) -> None:
    """Divides, with the sink in the denominator, and writes; 0 and -inf in rows that saw nothing, or are padding."""
    highest, sink = (state.highest * program.unit)[:, None], program.inputs.operands.sinks
    seen = highest > -jnp.inf
    if sink is not None:
        sink = jnp.broadcast_to(program.of_heads(sink, row), highest.shape)
        for part in leading:  # of the keys: the first one has the sink
            sink = jnp.where(part == 0, sink, -jnp.inf)
    # Of one number for each row instead of all features: what these have to be multiplied by.
    one = online_softmax.State(highest, state.total[:, None], jnp.ones_like(highest))
    factor, result = online_softmax.finish(one, sink)
    if program.inputs.mask.query_lengths is not None:
        exists = program.rows(Place(row, row)) < program.row_limit()
        seen, result = seen & exists, result._replace(highest=jnp.where(exists, result.highest, -jnp.inf))
    program.store_rows(out, tuple(jnp.where(seen, x * factor, 0.0) for x in state.weighted), row, *leading)
    for into, numbers in zip(normalizer, result):
        program.store_row_numbers(into, numbers[:, 0], row, *leading)
