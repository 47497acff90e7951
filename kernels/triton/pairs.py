"""Reading tiles of arrays that have an entry for each pair of query and key: bias and mask, `[#B, #N, #T, #S]`."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mqa_jax.kernels.triton.call import divided, load, span
from mqa_jax.kernels.triton.program import Place, Program, line


def load_pairs(program: Program, x: Any, place: Place, masked: bool) -> Array:
    """A tile, in which axes of size 1 stay; 0 where a pair is outside the array."""
    size, rows, columns = program.sizes, program.config.rows, program.config.columns
    each_row, each_column = x.shape[2] > 1 or _mixes_heads(program, x), x.shape[3] > 1
    row_exists = column_exists = None
    if each_row and _may_overhang(masked, size.T, rows, program.ragged_rows()):
        row_exists = place.row + line(rows) < program.row_limit()
    if each_column and _may_overhang(masked, size.S, columns, program.ragged_columns()):
        column_exists = place.column + line(columns) < program.column_limit()
    where = _outer(row_exists, column_exists, (rows, columns), each_row, each_column)
    tile = load(x, *_index(program, x, place), where=where)
    tile = tile.reshape(rows if each_row else 1, columns if each_column else 1)
    return tile.T if program.transposed else tile


def _mixes_heads(program: Program, x: Any) -> bool:
    """Whether the rows of one tile are in different heads of the array."""
    return program.group > 1 and x.shape[1] > 1


def _may_overhang(masked: bool, length: int, tile: int, ragged: bool) -> bool:
    """Whether a tile may extend beyond the array: tiles without mask may do so on the axis that a program owns."""
    return ragged if masked else length % tile != 0


def _index(program: Program, x: Any, place: Place) -> tuple[Any, ...]:
    rows, columns = program.config.rows, program.config.columns
    head, row, column = program.head, span(place.row, rows), span(place.column, columns)
    if program.group > 1 and (x.shape[1] > 1 or x.shape[2] > 1):  # a query and a head for each row, not one span
        row, member = divided(place.row + line(rows), program.group)
        head = head * program.group + member
        if x.shape[3] > 1:
            head, row = head[:, None], row[:, None]
            column = (place.column + line(columns))[None]
    return tuple(0 if n == 1 else i for n, i in zip(x.shape, (program.batch, head, row, column)))


def _outer(row: Array | None, column: Array | None, tile: tuple[int, int], each_row: bool, each_column: bool) -> Any:
    """The conditions on rows and on columns combined, on the axes of the tile."""
    if not (each_row and each_column):
        return row if each_row else column
    upright = None if row is None else row[:, None]
    both = upright if column is None else column[None] if upright is None else upright & column[None]
    return None if both is None else jnp.broadcast_to(both, tile)
