"""Derivatives of derivatives, with memory linear in T and S: textbook attention in blocks of queries.

A block computes the weights `[B, N, bq, S]` of the reference, and JAX differentiates it to any order. Each derivative
computes the weights of a block again (`jax.checkpoint`), so no two blocks hold them at the same time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mqa_jax import reference
from mqa_jax.inputs import Inputs
from mqa_jax.shapes import Length

MAX_SCORES = 1 << 22  # of a block, 16 MiB in float32
OfLeaves = Callable[[Sequence[Array]], Any]  # a function of the leaves of `Inputs`


def attend(inputs: Inputs) -> tuple[Array, Array]:
    """Output and log-sum-exp."""
    size = inputs.sizes
    rows = _rows_of_a_block(inputs)
    blocks = -(-size.T // rows)
    parts = _parts(inputs, rows, blocks)

    @jax.checkpoint
    def block(part: dict[str, Any]) -> tuple[Array, Array]:
        return _with_residual(_with_rows(inputs, part))

    results = lax.map(block, parts)  # [blocks, B, rows, ...]
    joined = lambda x: x.swapaxes(0, 1).reshape(x.shape[1], blocks * rows, *x.shape[3:])[:, : size.T]
    return jax.tree.map(joined, results)


def gradients(
    function: OfLeaves, leaves: Sequence[Array], cotangents: Sequence[Array], wanted: Sequence[int]
) -> list[Array]:
    """The gradients of some leaves."""
    _, transposed = jax.vjp(_of_some(function, leaves, wanted), *(leaves[number] for number in wanted))
    return list(transposed(tuple(cotangents)))


def derivative(function: OfLeaves, leaves: Sequence[Array], tangents: dict[int, Array]) -> list:
    """The tangents of the results, where some leaves have a tangent."""
    numbers = list(tangents)
    _, moved = jax.jvp(_of_some(function, leaves, numbers), [leaves[i] for i in numbers], list(tangents.values()))
    return list(moved)


def _of_some(function: OfLeaves, leaves: Sequence[Array], numbers: Sequence[int]) -> Callable:
    """The function of the leaves with these numbers; the others are constant."""
    return lambda *some: function([dict(zip(numbers, some)).get(i, x) for i, x in enumerate(leaves)])


def _with_residual(inputs: Inputs) -> tuple[Array, Array]:
    out, log_sum_exp, _ = reference.forward_with_weights(inputs)
    return out, log_sum_exp


def _rows_of_a_block(inputs: Inputs) -> Length:
    size = inputs.sizes
    if not all(isinstance(n, int) for n in (size.B, size.T, size.S)):
        return size.T
    fit = min(max(1, MAX_SCORES // (size.B * size.N * size.S)), size.T)
    return -(-size.T // math.ceil(size.T / fit))


def _parts(inputs: Inputs, rows: Length, blocks: Length) -> dict[str, Any]:
    """What belongs to the rows of each block, with the blocks as leading axis.

    Rows that are added are padding.
    """
    size, mask, dropout = inputs.sizes, inputs.mask, inputs.dropout
    start = jnp.arange(blocks, dtype=jnp.int32)[:, None] * rows
    lengths = jnp.full(size.B, size.T, jnp.int32) if mask.query_lengths is None else mask.query_lengths
    offset = jnp.zeros(1, jnp.int32) if mask.query_offset is None else mask.query_offset

    def cut(x: Array | None, axis: int) -> Array | None:
        if x is None or x.shape[axis] != size.T:
            return None
        padding = [(0, blocks * rows - size.T if i == axis else 0) for i in range(x.ndim)]
        shape = *x.shape[:axis], blocks, rows, *x.shape[axis + 1 :]
        return jnp.moveaxis(jnp.pad(x, padding).reshape(shape), axis, 0)

    parts = dict(
        query=cut(inputs.operands.query, 1),
        bias=cut(inputs.operands.bias, 2),
        allowed=cut(mask.allowed, 2),
        query_segments=cut(mask.query_segments, 1),
        query_lengths=lengths[None] - start,
        query_offset=offset[None] + start,
        first=None if dropout is None else dropout.numbers_of_first()[None] + start * jnp.array([[0, 1, 0]], jnp.int32),
    )
    return {name: x for name, x in parts.items() if x is not None}


def _with_rows(inputs: Inputs, part: dict[str, Any]) -> Inputs:
    of_operands = {name: part[name] for name in ("query", "bias") if name in part}
    names = "allowed", "query_segments", "query_lengths", "query_offset"
    of_mask = {name: part[name] for name in names if name in part}
    dropout = None if inputs.dropout is None else replace(inputs.dropout, first=part["first"])
    operands, mask = replace(inputs.operands, **of_operands), replace(inputs.mask, **of_mask)
    return replace(inputs, operands=operands, mask=mask, dropout=dropout)
