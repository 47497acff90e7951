"""The gradients of the terms that are added to the scores, bias and ALiBi slopes, as a separate Triton kernel.

If these gradients are not used, XLA removes the kernel. It sums over the axes along which a bias is shared: a program
owns a tile of the bias and visits every tile of pairs that reads it, so that no array of the size [B, N, T, S] is
written unless the bias has that size. The tiles that a program visits:

    bias [1, N, T, S]    one tile, in every batch row
    bias [1, N, 1, S]    a tile of keys with all tiles of queries, in every batch row
    bias [1, N, T, 1]    a tile of queries with all tiles of keys, in every batch row
    bias [1, N, 1, 1]    the same, and the sums of the tiles of queries are added up afterwards; also for slopes
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import tile_bounds
from mqa_jax.kernels.tiles import Index
from mqa_jax.kernels.triton.backward import Rows, Saved, d_scores
from mqa_jax.kernels.triton.call import divided, kernel_call, load, program_id, span, store
from mqa_jax.kernels.triton.grid import Share, shares_of
from mqa_jax.kernels.triton.io import load_keys
from mqa_jax.kernels.triton.mask import distance
from mqa_jax.kernels.triton.program import Place, Program, line
from mqa_jax.kernels.triton.tile_config import TileConfig

MAX_SHARES = 64  # only arrays of few tiles are shared, so these sums are small


def d_bias(inputs: Inputs, saved: Saved, config: TileConfig, interpret: bool) -> Float[Array, "#B #N #T #S"]:
    bias = inputs.operands.bias
    assert bias is not None  # the caller has checked it
    return _summed(inputs, saved, Reduction.over(inputs, bias.shape, config), config, interpret).astype(
        inputs.dtype_of_gradient(bias)
    )


def d_slopes(inputs: Inputs, saved: Saved, config: TileConfig, interpret: bool) -> Float[Array, " N"]:
    """The score contains - slope * distance."""
    slopes = inputs.operands.alibi_slopes
    assert slopes is not None
    reduction = Reduction.over(inputs, (1, inputs.sizes.N, 1, 1), config)
    sums = _summed(inputs, saved, reduction, config, interpret, times_distance=True)
    return -sums[0, :, 0, 0].astype(inputs.dtype_of_gradient(slopes))


class Reduction(NamedTuple):
    """The axes over which a program sums; of the others it owns a part."""

    shape: tuple[int, ...]  # of the bias
    row_tiles: int  # owned by different programs; 1 if each program sums over all of them
    column_tiles: int
    batches: int  # summed over
    heads: int
    shares: int

    @classmethod
    def over(cls, inputs: Inputs, shape: tuple[int, ...], config: TileConfig) -> "Reduction":
        size = inputs.sizes
        row_tiles, column_tiles = -(-size.T // config.rows), -(-size.S // config.columns)
        columns = column_tiles if shape[3] > 1 else 1
        rows = row_tiles if shape[2] > 1 or shape[3] == 1 else 1
        batches, heads = size.B // shape[0], size.N // shape[1]
        steps = batches * heads * (row_tiles // rows) * (column_tiles // columns)
        shares = shares_of(rows * columns * shape[0] * shape[1], max_shares=min(MAX_SHARES, steps))
        return cls(shape, rows, columns, batches, heads, shares)

    @property
    def sums_rows(self) -> bool:
        return self.shape[2] == 1 and self.shape[3] > 1

    @property
    def sums_columns(self) -> bool:
        return self.shape[3] == 1

    @property
    def grid(self) -> tuple[int, ...]:
        return self.row_tiles * self.column_tiles, self.shares, self.shape[0] * self.shape[1]

    @property
    def sums(self) -> tuple[int, ...]:
        """The shape of what the programs write: with an axis of shares, and one number a tile of queries if T is 1."""
        rows = self.row_tiles if self.sums_columns and self.shape[2] == 1 else self.shape[2]
        return self.shares, *self.shape[:2], rows, self.shape[3]


def _summed(
    inputs: Inputs,
    saved: Saved,
    reduction: Reduction,
    config: TileConfig,
    interpret: bool,
    times_distance: bool = False,
) -> Float[Array, "#B #N #T #S"]:
    def kernel(inputs: Inputs, saved: Saved, hull: Any, out: Any) -> None:
        batch, head = divided(program_id(2), reduction.shape[1])
        _one_tile(Program(inputs, config, interpret, batch, head), saved, reduction, hull, out, times_distance)

    shape = jax.ShapeDtypeStruct(reduction.sums, jnp.float32)
    run = kernel_call("mqa_dscore", kernel, reduction.grid, config, shape, interpret)
    sums = jnp.sum(run(inputs, saved, _hull(inputs, reduction, config)), axis=0)
    return sums if sums.shape == reduction.shape else jnp.sum(sums, axis=2, keepdims=True)


def _hull(inputs: Inputs, reduction: Reduction, config: TileConfig) -> Int[Array, "tiles 2"]:
    """The range of tiles that some batch row needs, for each tile on the other axis."""
    table = tile_bounds.row_tiles if reduction.sums_rows else tile_bounds.key_tiles
    bounds = table(inputs.mask, inputs.sizes, config.rows, config.columns)
    return jnp.stack([jnp.min(bounds[..., 0], axis=0), jnp.max(bounds[..., 3], axis=0)], axis=-1)


def _one_tile(program: Program, saved: Saved, reduction: Reduction, hull: Any, out: Any, times_distance: bool) -> None:
    config, operands = program.config, program.inputs.operands
    row_tile, column_tile = divided(program_id(0), reduction.column_tiles)
    fixed = column_tile if reduction.sums_rows else row_tile
    start, stop = (load(hull, fixed, which) for which in (0, 1))
    if not (reduction.sums_rows or reduction.sums_columns):  # one tile, if it is needed
        needed = (start <= column_tile) & (column_tile < stop)
        start, stop = column_tile, column_tile + needed.astype(jnp.int32)
    tiles = jnp.maximum(stop - start, 0)
    steps = tiles * (reduction.batches * reduction.heads)

    def step(number: Index, total: Float[Array, "bq bk"]) -> Float[Array, "bq bk"]:
        pair, turn = divided(number, jnp.maximum(tiles, 1))
        batch, head = divided(pair, reduction.heads)  # counted within the summed axes
        one = program.of_head(program.batch + batch, program.head + head)
        row, column = (start + turn, column_tile) if reduction.sums_rows else (row_tile, start + turn)
        place = Place(row * config.rows, column * config.columns)
        rows = Rows.load(one, saved, place.row, masked=True)
        key, value = (load_keys(one, x, place.column, masked=True) for x in (operands.key, operands.value))
        _, d_score, _ = d_scores(one, rows, key, value, place, masked=True)
        return total + (d_score * distance(one, place) if times_distance else d_score)

    total = jnp.zeros((config.rows, config.columns), jnp.float32)
    share = Share(program_id(1), reduction.shares)
    total = lax.fori_loop(*share.range(steps), step, total)
    _store(program, reduction, total, Place(row_tile, column_tile), share, out)


def _store(
    program: Program, reduction: Reduction, total: Float[Array, "bq bk"], tile: Place, share: Share, out: Any
) -> None:
    """Sums over the axes of the tile, and writes the result; `tile` counts tiles."""
    size, config = program.sizes, program.config
    index = share.number, program.batch, program.head
    row, column = tile.row * config.rows, tile.column * config.columns
    rows, columns = row + line(config.rows), column + line(config.columns)
    if reduction.sums_columns:
        sums = jnp.sum(total, axis=1)
        if reduction.shape[2] == 1:
            store(out, jnp.sum(sums, axis=0), *index, tile.row, 0)
        else:
            store(out, sums, *index, span(row, config.rows), 0, where=rows < size.T)
    elif reduction.sums_rows:
        sums = jnp.sum(total, axis=0)
        store(out, sums, *index, 0, span(column, config.columns), where=columns < size.S)
    else:
        where = (rows < size.T)[:, None] & (columns < size.S)[None]
        store(out, total, *index, span(row, config.rows), span(column, config.columns), where=where)
