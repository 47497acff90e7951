"""The order in which the programs of a kernel start, and the tiles that each of them visits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels.tiles import Index
from mqa_jax.kernels.triton.call import divided, load, program_id
from mqa_jax.kernels.triton.mask import may_mask
from mqa_jax.kernels.triton.program import Program
from mqa_jax.kernels.triton.tile_config import TileConfig

MAX_SHARED_PROGRAMS = 512  # about four on each of 128 multiprocessors; work is shared only up to so many
MAX_SHARES = 4  # each needs as much memory as dK and dV in float32
MAX_L2_BYTES = 24 << 20  # of keys and values that programs read at the same time; H100 has 50 MB of L2, A100 40


def over_query_tiles(inputs: Inputs, config: TileConfig) -> tuple[tuple[int, ...], Callable[[], tuple[Array, ...]]]:
    """The grid, one program for each tile of queries and query head, and a function that returns (batch, head, tile).

    Last tiles first: under a causal mask they take the longest. Heads that read the same keys start together, with as
    many more heads as fit into the L2 cache.
    """
    size = inputs.sizes
    tiles = -(-size.T // config.rows)
    together = size.G * _kv_heads_together(size, jnp.dtype(inputs.dtype).itemsize)
    grid = together, tiles, size.B * size.N // together

    def place() -> tuple[Array, ...]:
        batch, head = divided(program_id(2) * together + program_id(0), size.N)
        return batch, head, tiles - 1 - program_id(1)

    return grid, place


def over_key_tiles(inputs: Inputs, config: TileConfig) -> tuple[tuple[int, ...], int, Callable[[], tuple[Array, ...]]]:
    """The grid, the number of shares, and a function that returns (batch, kv_head, share, tile).

    One program for each tile of keys, key/value head and share. First tiles first: under a causal mask they take the
    longest.
    """
    size = inputs.sizes
    tiles = -(-size.S // config.columns)
    shares = shares_of(tiles * size.B * size.K, max_shares=min(MAX_SHARES, size.G * -(-size.T // config.rows)))
    grid = tiles, shares, size.B * size.K

    def place() -> tuple[Array, ...]:
        return *divided(program_id(2), size.K), program_id(1), program_id(0)

    return grid, shares, place


def shares_of(programs: int, max_shares: int) -> int:
    """The number of parts of each program's work, for about four programs on each of 128 multiprocessors."""
    return max(1, min(max_shares, MAX_SHARED_PROGRAMS // programs))


def _kv_heads_together(size: Sizes, itemsize: int) -> int:
    """The largest divisor of K whose keys and values fit into L2, at least 1."""
    bytes_per_head = size.S * (size.H + size.V) * itemsize
    fits = lambda heads: size.K % heads == 0 and heads * bytes_per_head <= MAX_L2_BYTES
    return max(filter(fits, range(1, size.K + 1)), default=1)


class Share(NamedTuple):
    """One program's part of the work: part `number` of `of`."""

    number: Array
    of: int

    def range(self, steps: Array) -> tuple[Array, Array]:
        part = lambda number: lax.div(steps * number, jnp.int32(self.of))
        return part(self.number), part(self.number + 1)


@dataclass(frozen=True)
class Visits:
    """The tiles that a program visits, in order: `full` tiles without mask, then `masked` tiles on both sides of them.

    A program that owns queries visits tiles of keys; one that owns keys visits tiles of queries.
    """

    start: Array
    full_start: Array
    full_stop: Array
    stop: Array
    count: int  # number of tiles on this axis
    any_masked: bool  # static: whether some program may have a masked tile

    @classmethod
    def load(cls, program: Program, bounds: Any, tile: Array) -> "Visits":
        """From a table of `tile_bounds`."""
        batch = program.batch if bounds.shape[0] > 1 else 0
        start, full_start, full_stop, stop = (load(bounds, batch, tile, i) for i in range(4))
        sides = (program.sizes.T, program.config.rows), (program.sizes.S, program.config.columns)
        length, side = sides[0 if program.transposed else 1]
        return cls(start, full_start, full_stop, stop, -(-length // side), may_mask(program))

    @property
    def full(self) -> Array:
        return self.full_stop - self.full_start

    @property
    def left(self) -> Array:
        return self.full_start - self.start

    @property
    def masked(self) -> Array:
        return self.left + self.stop - self.full_stop

    def tile(self, step: Index, masked: bool) -> Array:
        """The tile that a step of either loop visits."""
        if not masked:
            return self.full_start + step
        return jnp.where(step < self.left, self.start + step, self.full_stop + step - self.left)

    def previous(self, step: Index, masked: bool) -> Array:
        """The tile visited one step before; at the very first step, any tile inside the array."""
        if not masked:
            return jnp.maximum(self.full_start + step - 1, self.full_start)
        before = jnp.where(self.full > 0, self.full_stop - 1, self.start)
        return self._existing(jnp.where(step == 0, before, self.tile(step - 1, masked)))

    def last(self) -> Array:
        """The tile visited last, if any."""
        return self.previous(self.masked, masked=True)

    def _existing(self, tile: Array) -> Array:
        return jnp.clip(tile, 0, self.count - 1)
