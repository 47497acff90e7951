"""The visible pairs of a tile (`mqa_jax.masks` defines them), and the distances of their positions."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mqa_jax import masks
from mqa_jax.kernels.triton.call import load, span
from mqa_jax.kernels.triton.functions import allowed
from mqa_jax.kernels.triton.pairs import load_pairs
from mqa_jax.kernels.triton.positions import key_positions, query_positions
from mqa_jax.kernels.triton.program import Place, Program, line


def may_mask(program: Program) -> bool:
    """Whether some tile has pairs that are hidden or outside the array (outside on the owned axis needs no mask)."""
    ragged = program.ragged_rows() if program.transposed else program.ragged_columns()
    return program.inputs.mask.hides_pairs or ragged


def visible(program: Program, place: Place) -> Bool[Array, "..."] | None:
    """True where a key is inside the array and the mask does not hide the pair. The caller masks padded queries."""
    mask, conditions = program.inputs.mask, []
    if mask.is_causal or mask.window is not None:
        conditions += masks.in_reach(mask, query_positions(program, place), key_positions(program, place))
    if program.ragged_columns():
        conditions.append(program.columns(place) < program.column_limit())
    if mask.query_segments is not None:
        conditions.append(_row_segments(program, place) == _column_segments(program, place))
    if mask.allowed is not None:
        conditions.append(load_pairs(program, mask.allowed, place, True))
    if mask.function is not None:
        conditions.append(allowed(program, place, mask.function))
    result = None
    for condition in conditions:
        result = condition if result is None else result & condition
    return result


def distance(program: Program, place: Place) -> Float[Array, "..."]:
    """|query position - key position|"""
    return masks.apart(query_positions(program, place), key_positions(program, place)).astype(jnp.float32)


def _row_segments(program: Program, place: Place) -> Array:
    ids, rows, length = program.inputs.mask.query_segments, program.config.rows, program.sizes.T
    where = place.row + line(rows) < length if length % rows else None
    ids = load(ids, program.batch, span(place.row, rows), where=where)
    return ids[None] if program.transposed else ids[:, None]


def _column_segments(program: Program, place: Place) -> Array:
    ids, columns, length = program.inputs.mask.key_segments, program.config.columns, program.sizes.S
    where = place.column + line(columns) < length if length % columns else None
    ids = load(ids, program.batch, span(place.column, columns), where=where)
    return ids[:, None] if program.transposed else ids[None]
