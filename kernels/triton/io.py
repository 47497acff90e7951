"""Reading and writing the tiles of a program.

Every read and write has a mask of the entries inside the array, unless the whole tile is known to be inside: no access
relies on the compiler to stay inside. Features are split into pieces of a power of two (80 = 64 + 16), so no head size
is padded to the next power of two.

`masked`: the tile may have entries outside the array or in the padding, which are read as 0.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mqa_jax.kernels.triton.call import load, span, store
from mqa_jax.kernels.triton.program import Program, axis, line
from mqa_jax.kernels.triton.tile_config import TileConfig

Pieces = tuple[Array, ...]  # of the features of a tile, each [tile, power of two]


class Piece(NamedTuple):
    """A range of features: the first, the width of the tile, and how many of these are inside the array."""

    start: int
    width: int
    existing: int


def pieces(features: int, widest: int) -> Iterator[Piece]:
    """Powers of two from 16 on that cover the features; only the last piece may extend beyond them."""
    start, left = 0, -(-features // 16) * 16
    while left:
        width = min(widest, 1 << (left.bit_length() - 1))
        yield Piece(start, width, min(width, features - start))
        start, left = start + width, left - width


def zeros(tile: int, features: int, config: TileConfig) -> Pieces:
    """Initial values of float32 sums."""
    return tuple(jnp.zeros((tile, width), jnp.float32) for _, width, _ in pieces(features, config.features))


# -- reading ----------------------------------------------------------------------------------------------------------


def load_queries(program: Program, x: Any, start: Array, masked: bool) -> Pieces:
    """A tile of a query-side array `[B, T, N, X]`."""
    limit = program.row_limit() if masked and program.ragged_rows() else None
    return _load_tile(program, x, start, program.config.rows, program.head, limit)


def load_keys(program: Program, x: Any, start: Array, masked: bool) -> Pieces:
    """A tile of a key-side array `[B, S, K, X]`."""
    limit = program.column_limit() if masked and program.ragged_columns() else None
    return _load_tile(program, x, start, program.config.columns, program.kv_head, limit)


def load_scales(program: Program, x: Any, start: Array, masked: bool) -> Float[Array, "1 bk"]:
    """A tile of `[B, S, K]`, the scales of quantized keys or values."""
    columns = program.config.columns
    where = start + line(columns) < program.column_limit() if masked and program.ragged_columns() else None
    return load(x, program.batch, span(start, columns), program.kv_head, where=where)[None]


def load_row_numbers(program: Program, x: Any, start: Array, masked: bool, other: float = 0.0) -> Float[Array, " bq"]:
    """A tile of `[B, N, T]`, one number for each query; `other` outside the array and in the padding."""
    rows = program.config.rows
    where = start + line(rows) < program.row_limit() if masked and program.ragged_rows() else None
    numbers = load(x, program.batch, program.head, span(start, rows), where=where)
    return numbers if where is None or other == 0.0 else jnp.where(where, numbers, other)


def load_head_numbers(program: Program, x: Any, row: Array) -> Float[Array, "..."]:
    """Slopes or sinks: one number of the head, or one for each row where rows are heads (`[K, rows]`)."""
    if len(x.shape) == 1:
        return load(x, program.head).astype(jnp.float32)
    rows = program.config.rows
    return load(x, program.head, span(row, rows), where=row + line(rows) < program.sizes.T)[:, None]


def _load_tile(program: Program, x: Any, start: Array, tile: int, head: Array, limit: Any) -> Pieces:
    def load_piece(piece: Piece) -> Array:
        where = _inside(start, tile, limit, piece)
        return load(x, program.batch, span(start, tile), head, span(piece.start, piece.width), where=where)

    return tuple(map(load_piece, pieces(x.shape[-1], program.config.features)))


# -- writing ----------------------------------------------------------------------------------------------------------


def store_rows(program: Program, into: Any, values: Pieces, start: Array, *leading: Array) -> None:
    """Writes a tile of `[..., B, T, N, X]`."""
    _store_tile(program, into, values, start, program.config.rows, program.head, program.sizes.T, leading)


def store_columns(program: Program, into: Any, values: Pieces, start: Array, *leading: Array) -> None:
    """Writes a tile of `[..., B, S, K, X]`."""
    _store_tile(program, into, values, start, program.config.columns, program.kv_head, program.sizes.S, leading)


def _store_tile(
    program: Program,
    into: Any,
    values: Pieces,
    start: Array,
    tile: int,
    head: Array,
    length: int,
    leading: tuple[Array, ...],
) -> None:
    limit = length if length % tile else None
    for value, piece in zip(values, pieces(into.shape[-1], program.config.features)):
        where = _inside(start, tile, limit, piece)
        index = *leading, program.batch, span(start, tile), head, span(piece.start, piece.width)
        store(into, value, *index, where=where)


def store_row_numbers(program: Program, into: Any, numbers: Float[Array, " bq"], start: Array, *leading: Array) -> None:
    """Writes a tile of `[..., B, N, T]`."""
    rows = program.config.rows
    where = start + line(rows) < program.sizes.T if program.sizes.T % rows else None
    store(into, numbers, *leading, program.batch, program.head, span(start, rows), where=where)


def _inside(start: Array, tile: int, limit: Any, piece: Piece) -> Bool[Array, "tile width"] | None:
    """True where both the row and the feature are inside the array; None if all are."""
    rows = None if limit is None else (start + axis(tile, 0)) < limit
    features = None if piece.existing == piece.width else axis(piece.width, 1) < piece.existing
    if rows is None and features is None:
        return None
    both: Any = features if rows is None else rows if features is None else rows & features
    return jnp.broadcast_to(both, (tile, piece.width))
