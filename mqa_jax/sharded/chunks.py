"""What a device has of a sequence, in chunks, and attention of one chunk to another as an ordinary problem.

Device d of n has, of queries and keys alike,

    "contiguous"    one chunk, number d of n
    "zigzag"        chunks d and 2 n - 1 - d of 2 n

Attention of a chunk of queries to a chunk of keys is attention with another offset of the queries: causal masks,
windows and lengths then hide the pairs that they should, and kernels skip the tiles in which all are hidden. Arrays
with rows and columns (bias, mask) have the rows of the device and all columns, in the order of the devices.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mqa_jax import masks
from mqa_jax.inputs import Inputs

ORDERS = "contiguous", "zigzag"


class Chunk(NamedTuple):
    """Part of the queries or keys.

    Attributes:
      position: of its first entry in the sequence, int32.
      start: of its first entry in what the device has; static.
      column: of its first entry in arrays with all columns, int32.
      length: static.
    """

    position: Int[Array, ""]
    start: int
    column: Int[Array, ""]
    length: int

    def of(self, x: Any, axis: int = 1) -> Any:
        """Its entries of what a device has; an axis of size 1 is shared."""
        if x is None or x.shape[axis] in (1, self.length):
            return x
        return lax.slice_in_dim(x, self.start, self.start + self.length, axis=axis)

    def columns_of(self, x: Any, axis: int) -> Any:
        """Its entries of an array that has all columns."""
        if x is None or x.shape[axis] in (1, self.length):
            return x
        return lax.dynamic_slice_in_dim(x, self.column, self.length, axis)

    def lengths(self, whole: Int[Array, " B"] | None) -> Int[Array, " B"] | None:
        """How many of its entries are no padding."""
        return None if whole is None else jnp.clip(whole - self.position, 0, self.length)


@dataclass(frozen=True)
class Order:
    """How a sequence is cut over `devices`; static."""

    name: str
    devices: int

    @property
    def count(self) -> int:
        """Chunks of each device."""
        return 2 if self.name == "zigzag" else 1

    def chunks(self, device: Int[Array, ""], length: int) -> list[Chunk]:
        """Of a device that has `length` entries."""
        length //= self.count
        numbers = [device, 2 * self.devices - 1 - device][: self.count]
        first = device * self.count
        return [Chunk(number * length, i * length, (first + i) * length, length) for i, number in enumerate(numbers)]


def rows(inputs: Inputs, queries: Chunk) -> Inputs:
    """The problem of a chunk of queries, with the keys that it has."""
    operands, mask = inputs.operands, inputs.mask
    operands = replace(operands, query=queries.of(operands.query), bias=queries.of(operands.bias, axis=2))
    mask = replace(
        mask,
        allowed=queries.of(mask.allowed, axis=2),
        query_lengths=queries.lengths(mask.query_lengths),
        query_segments=queries.of(mask.query_segments),
    )
    return replace(inputs, operands=operands, mask=mask)


def pair(inputs: Inputs, queries: Chunk, keys: Chunk, key: Array, value: Array, is_part: bool = True) -> Inputs:
    """Attention of a chunk of queries to a chunk of keys, without sinks, which are in no chunk."""
    inputs = rows(inputs, queries)
    operands, mask, dropout = inputs.operands, inputs.mask, inputs.dropout
    score_fn, mask_fn = inputs.score_fn, mask.function
    if score_fn is not None:
        score_fn = score_fn.with_first(position=keys.position, of_scores=True)
    if mask_fn is not None:
        mask_fn = mask_fn.with_first(position=keys.position, of_scores=False)
    offset = jnp.zeros(1, jnp.int32) if mask.query_offset is None else mask.query_offset
    operands = replace(
        operands,
        key=key,
        value=value,
        bias=keys.columns_of(operands.bias, axis=3),
        key_scale=keys.columns_of(operands.key_scale, axis=1),
        value_scale=keys.columns_of(operands.value_scale, axis=1),
        sinks=None,
    )
    mask = replace(
        mask,
        query_offset=masks.minus(masks.plus(offset, queries.position), keys.position),
        allowed=keys.columns_of(mask.allowed, axis=3),
        key_lengths=keys.lengths(mask.key_lengths),
        key_segments=keys.columns_of(mask.key_segments, axis=1),
        function=mask_fn,
    )
    if dropout is not None:
        dropout = dropout.with_first(row=queries.position, column=keys.position)
    changes: dict[str, Any] = dict(mask=mask, dropout=dropout, score_fn=score_fn, residual=True, is_part=is_part)
    return replace(inputs, operands=operands, **changes)


def add_pairs(total: Array, part: Array, queries: Chunk, keys: Chunk) -> Array:
    """Adds the gradient of a chunk's part of a bias to that of what the device has."""
    start = [0, 0, queries.start if total.shape[2] > 1 else 0, keys.column if total.shape[3] > 1 else 0]
    old = lax.dynamic_slice(total, start, part.shape)
    return lax.dynamic_update_slice(total, old + part, start)
