"""The positions of the queries and keys of a tile (`mqa_jax.masks` defines them)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mqa_jax import masks
from mqa_jax.kernels.triton.call import load
from mqa_jax.kernels.triton.program import Place, Program


def query_positions(program: Program, place: Place, inside: bool = False) -> Array:
    """`inside`: rows outside the array have the position of the last one."""
    queries = program.queries_of_rows(place)
    if inside and program.sizes.T % program.config.rows:
        queries = jnp.minimum(queries, program.sizes.T // program.group - 1)
    return queries + _query_offset(program)


def key_positions(program: Program, place: Place, inside: bool = False) -> Array:
    """`inside`: as for `query_positions`."""
    columns, ring = program.columns(place), program.inputs.mask.ring
    if inside and program.sizes.S % program.config.columns:
        columns = jnp.minimum(columns, program.sizes.S - 1)
    return columns if ring is None else masks.ring_positions(columns, load(ring.lengths, program.batch), ring.slots)


def _query_offset(program: Program) -> Any:
    offset = program.inputs.mask.query_offset
    return 0 if offset is None else load(offset, program.batch if offset.shape[0] > 1 else 0)
