"""Few queries on many keys, as in decoding: a Triton kernel that reads the cache once, without copying it.

The rows of a tile are the query positions times the G query heads of a key/value head, so that each key is read once
for all of them. The keys are split over programs, each with its own softmax (Flash-Decoding); their results are merged
by log-sum-exp. A split is a part of the tiles that a row of the batch needs, so the time grows with the length of that
row, or with the window.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels import tile_bounds
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.triton.call import divided, kernel_call, program_id
from mqa_jax.kernels.triton.forward import attend, finish
from mqa_jax.kernels.triton.grid import Share, Visits
from mqa_jax.kernels.triton.merge import merge
from mqa_jax.kernels.triton.pack import pack, unpack
from mqa_jax.kernels.triton.program import Program
from mqa_jax.kernels.triton.tile_config import TileConfig
from mqa_jax.shapes import Output

MAX_QUERIES = 16  # with more queries, one head fills a tile
MAX_PROGRAMS = 384  # three for each of an H100's 132 multiprocessors: about as many as run at once
MIN_KEYS = 128  # of a split


def decode_kernel(inputs: Inputs, config: TileConfig, interpret: bool) -> tuple[Output, Normalizer]:
    """T is at most MAX_QUERIES."""
    size, row_tiles = inputs.sizes, row_tiles_of(inputs.sizes, config)
    splits = splits_of(size, row_tiles)
    alone = splits == 1
    packed = pack(inputs)
    rows = packed.sizes.T

    def kernel(inputs: Inputs, bounds: Any, out: Any, normalizer: Any) -> None:
        batch, kv_head = divided(program_id(2), size.K)
        program = Program(inputs, config, interpret, batch, kv_head, group=size.G)
        visits = Visits.load(program, bounds, program_id(1))
        split, row = Share(program_id(0), splits), program_id(1) * config.rows
        state = attend(program, row, visits, (split.range(visits.full), split.range(visits.masked)))
        finish(program, state, row, out, normalizer, split.number)

    number: Any = jax.ShapeDtypeStruct((splits, size.B, size.K, rows), jnp.float32)
    out = jax.ShapeDtypeStruct((splits, size.B, rows, size.K, size.V), inputs.out_dtype if alone else jnp.float32)
    shapes = out, Normalizer(number, number)
    mask = replace(inputs.mask, query_segments=packed.mask.query_segments)
    bounds = tile_bounds.key_tiles(mask, size, config.rows, config.columns, size.G)
    grid = splits, row_tiles, size.B * size.K
    outs, normalizers = kernel_call("mqa_decode", kernel, grid, config, shapes, interpret)(packed, bounds)
    if not alone:
        return merge(inputs, outs, normalizers, interpret)
    of_rows = lambda x: unpack(x[0].swapaxes(1, 2)[..., None], size)[..., 0]
    return unpack(outs[0], size), jax.tree.map(of_rows, normalizers)


def row_tiles_of(size: Sizes, config: TileConfig) -> int:
    return -(-size.T * size.G // config.rows)


def splits_of(size: Sizes, row_tiles: int) -> int:
    """The number of parts of the keys: no more than fill the GPU once, so that all end at about the same time."""
    max_splits = MAX_PROGRAMS // (size.B * size.K * row_tiles)
    return max(1, min(max_splits, size.S // MIN_KEYS))


def partial_bytes(size: Sizes, splits: int) -> int:
    """Bytes of the outputs and normalizers of all parts, float32: the temporary memory of a step.

    (Except four numbers for each tile of rows, `tile_bounds`, and copies of query and output where heads of a group are
    not neighbours.) At most MAX_PROGRAMS tiles of rows, for a cache of any length.
    """
    return 4 * splits * size.B * size.T * size.N * (size.V + 2) if splits > 1 else 0
