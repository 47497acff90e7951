"""Few queries on many keys, as in decoding: a Triton kernel that reads the cache once, where it lies.

The query heads of a key/value head times the query positions are the rows of a tile, G to a query, so that each key is
read for all of them at once. The keys are split over programs, each with a softmax of its own (Flash-Decoding); what
they find is merged by its log-sum-exp. A split is a part of the tiles that a row of the batch needs, so short rows cost
little, and a window costs a window.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels import tile_bounds, triton_call, triton_merge
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.tile_config import TileConfig
from mqa_jax.kernels.triton_call import divided, program_id
from mqa_jax.kernels.triton_forward import attend, finish
from mqa_jax.kernels.triton_grid import KeyTiles, Share
from mqa_jax.kernels.triton_tile import Program
from mqa_jax.shapes import Output

MOST_QUERIES = 16  # beyond, a tile of one head is well filled
ENOUGH_PROGRAMS = 384  # three for each of an H100's 132 multiprocessors: about as many as it holds at once
LEAST_KEYS = 128  # of a split


def forward(inputs: Inputs, config: TileConfig, interpret: bool) -> tuple[Output, Normalizer]:
    """T is at most MOST_QUERIES."""
    size, row_tiles = inputs.sizes, row_tiles_of(inputs.sizes, config)
    splits = splits_of(size, row_tiles)
    alone = splits == 1
    packed = pack(inputs)
    rows = packed.sizes.T

    def kernel(inputs: Inputs, bounds: Any, out: Any, normalizer: Any) -> None:
        batch, kv_head = divided(program_id(2), size.K)
        program = Program(inputs, config, interpret, batch, kv_head, group=size.G)
        key_tiles = KeyTiles.load(program, bounds, program_id(1))
        split, row = Share(program_id(0), splits), program_id(1) * config.rows
        state = attend(program, row, key_tiles, (split.range(key_tiles.full), split.range(key_tiles.masked)))
        finish(program, state, row, out, normalizer, split.number)

    number: Any = jax.ShapeDtypeStruct((splits, size.B, size.K, rows), jnp.float32)
    out = jax.ShapeDtypeStruct((splits, size.B, rows, size.K, size.V), inputs.dtype if alone else jnp.float32)
    shapes = out, Normalizer(number, number)
    mask = replace(inputs.mask, query_segments=packed.mask.query_segments)
    bounds = tile_bounds.key_tiles(mask, size, config.rows, config.columns, size.G)
    grid = splits, row_tiles, size.B * size.K
    outs, normalizers = triton_call.call("mqa_decode", kernel, grid, config, shapes, interpret)(packed, bounds)
    if not alone:
        return triton_merge.merge(inputs, outs, normalizers, interpret)
    of_rows = lambda x: unpack(x[0].swapaxes(1, 2)[..., None], size)[..., 0]
    return unpack(outs[0], size), jax.tree.map(of_rows, normalizers)


def row_tiles_of(size: Sizes, config: TileConfig) -> int:
    return -(-size.T * size.G // config.rows)


def splits_of(size: Sizes, row_tiles: int) -> int:
    """Into how many parts the keys are cut: no more than fill the GPU once, so that all end at about the same time."""
    most = ENOUGH_PROGRAMS // (size.B * size.K * row_tiles)
    return max(1, min(most, size.S // LEAST_KEYS))


def partial_bytes(size: Sizes, splits: int) -> int:
    """Of the outputs and normalizers of all parts, float32: all that a step takes beside its arguments and results.

    (But for four numbers for each tile of rows, `tile_bounds`, and copies of query and output where heads of a group
    have to be brought together.) No more than ENOUGH_PROGRAMS tiles of rows, whatever the length of the cache.
    """
    return 4 * splits * size.B * size.T * size.N * (size.V + 2) if splits > 1 else 0


def pack(inputs: Inputs) -> Inputs:
    """The same with `[B, T * G, K, H]` queries, the heads of a group side by side, and whatever belongs to them.

    Bias and mask, which may be as long as the cache, stay `[#B, #N, #T, #S]`: `Program.pairs` finds the rows in them.
    """
    operands, mask, size = inputs.operands, inputs.mask, inputs.sizes
    query = operands.query.reshape(size.B, size.T, size.K, size.G, size.H).swapaxes(2, 3)
    return replace(
        inputs,
        operands=replace(
            operands,
            query=query.reshape(size.B, size.T * size.G, size.K, size.H),
            alibi_slopes=_pack_heads(operands.alibi_slopes, size),
            sinks=_pack_heads(operands.sinks, size),
        ),
        mask=replace(
            mask,
            query_lengths=None if mask.query_lengths is None else mask.query_lengths * size.G,
            query_segments=None if mask.query_segments is None else jnp.repeat(mask.query_segments, size.G, axis=1),
        ),
    )


def _pack_heads(x: Float[Array, " N"] | None, size: Sizes) -> Float[Array, "K TG"] | None:
    return None if x is None else jnp.tile(x.astype(jnp.float32).reshape(size.K, size.G), (1, size.T))


def unpack(x: Float[Array, "B TG K X"], size: Sizes) -> Float[Array, "B T N X"]:
    return x.reshape(size.B, size.T, size.G, size.K, -1).swapaxes(2, 3).reshape(size.B, size.T, size.N, -1)
