"""The data of one program of a Triton kernel: a batch row, a head, and tiles that may extend beyond the arrays.

Tiles are `[bq, bk]`, queries x keys, in the forward pass and for dQ. For dK and dV they are transposed, `[bk, bq]`, so
that keys are the rows of all four matrix products: then 64 keys are enough for Hopper's wgmma, for any bq.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels.triton.call import divided, load
from mqa_jax.kernels.triton.tile_config import TileConfig


class Place(NamedTuple):
    """The place of a tile: its first query and key, int32 scalars."""

    row: Array
    column: Array


@dataclass(frozen=True)
class Program:
    """The inputs (references to whole arrays) for one batch row and one query head.

    Attributes:
      group: how many neighbouring rows are heads of one query (`pack`). If it is more than 1, `head` is the key/value
        head, and ALiBi slopes and sinks are `[K, rows]`.
    """

    inputs: Inputs
    config: TileConfig
    interpret: bool
    batch: Array
    head: Array
    transposed: bool = False
    group: int = 1

    @property
    def sizes(self) -> Sizes:
        return self.inputs.sizes

    @property
    def kv_head(self) -> Array:
        return divided(self.head, self.sizes.G)[0]

    def of_head(self, batch: Array, head: Array) -> "Program":
        return replace(self, batch=batch, head=head)

    # -- the queries and keys of a tile ---------------------------------------------------------------------------

    def rows(self, place: Place) -> Array:
        """Numbers of the rows, `[bq, 1]`, or `[1, bq]` if transposed."""
        return place.row + axis(self.config.rows, 1 if self.transposed else 0)

    def queries_of_rows(self, place: Place) -> Array:
        rows = self.rows(place)
        return rows if self.group == 1 else divided(rows, self.group)[0]

    def columns(self, place: Place) -> Array:
        """Numbers of the keys, along the other axis."""
        return place.column + axis(self.config.columns, 0 if self.transposed else 1)

    # -- which of them exist --------------------------------------------------------------------------------------

    def row_limit(self) -> Any:
        """Queries from this number on are outside the array, or are padding."""
        lengths = self.inputs.mask.query_lengths
        return self.sizes.T if lengths is None else jnp.minimum(load(lengths, self.batch), self.sizes.T)

    def column_limit(self) -> Any:
        lengths = self.inputs.mask.key_lengths
        return self.sizes.S if lengths is None else jnp.minimum(load(lengths, self.batch), self.sizes.S)

    def ragged_rows(self) -> bool:
        """Whether some tile of queries may have rows outside the array, or padding."""
        return self.sizes.T % self.config.rows != 0 or self.inputs.mask.query_lengths is not None

    def ragged_columns(self) -> bool:
        return self.sizes.S % self.config.columns != 0 or self.inputs.mask.key_lengths is not None


def line(length: int) -> Array:
    """0, 1, 2, ..."""
    return lax.iota(jnp.int32, length)


def axis(length: int, axis: int) -> Array:
    """0, 1, 2, ... along one of two axes."""
    return lax.broadcasted_iota(jnp.int32, (length, 1) if axis == 0 else (1, length), axis)
