"""Attention in tiles in plain XLA: the place of a tile, reading and writing its slices, its scores.

One tile is P key/value heads x bq query positions x bk keys of one batch row. The G query heads of a key/value head are
packed into the rows (R = bq * G), so K/V are never repeated and every matrix product has R rows. Where a length is no
multiple of the tile, the last tile is moved back inside the array, and the pairs it covers a second time are masked.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Real, Shaped

from mqa_jax import masks
from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels import tiles
from mqa_jax.shapes import Length, positions

Scores = Float[Array, "P bq G bk"]
Carry = TypeVar("Carry")
Range = tuple[tiles.Index, tiles.Index]
ZERO: Any = np.int32(0)  # an index to mix with int32 arrays: a Python 0 may become 64 bits wide


@dataclass(frozen=True)
class TileShape:
    """The size of one step.

    Attributes:
      rows: query positions, bq <= T.
      columns: keys, bk <= S.
      heads: key/value heads, P; divides K.
      upcast: multiply in `score_dtype`, for inputs of any dtype (CPUs have no fast 16-bit products).
    """

    rows: Length
    columns: Length
    heads: int
    upcast: bool


class Place(NamedTuple):
    """The place of a tile (int32 scalars): batch row, first key/value head, query and key; first owned query and key.

    A tile owns everything it covers, except where it was moved back inside the array.
    """

    batch: Array
    head: Array
    row: Array
    column: Array
    owned_row: Array
    owned_column: Array


# A step computes one tile, from its place, its mask (None: no pair is hidden) and the carry of the loop.
Step = Callable[[Place, Array | None, Carry], Carry]


@dataclass(frozen=True)
class Tiling:
    """The inputs, and access to their tiles."""

    inputs: Inputs
    shape: TileShape

    @property
    def sizes(self) -> Sizes:
        return self.inputs.sizes

    @property
    def row_tiles(self) -> Length:
        return -(-self.sizes.T // self.shape.rows)

    @property
    def column_tiles(self) -> Length:
        return -(-self.sizes.S // self.shape.columns)

    @property
    def head_blocks(self) -> Length:
        """Blocks of P heads in all batch rows."""
        return self.sizes.B * self.sizes.K // self.shape.heads

    # -- places ---------------------------------------------------------------------------------------------------

    def place(self, head_block: Array) -> Place:
        """The first tile of a block of heads. Loops count in 64 bits where `jax_enable_x64` is set, places do not."""
        block, blocks = jnp.asarray(head_block, jnp.int32), self.sizes.K // self.shape.heads
        return Place(block // blocks, block % blocks * self.shape.heads, ZERO, ZERO, ZERO, ZERO)

    def at_row_tile(self, place: Place, tile: Array) -> Place:
        owned = jnp.asarray(tile, jnp.int32) * self.shape.rows
        return place._replace(row=jnp.minimum(owned, self.sizes.T - self.shape.rows), owned_row=owned)

    def at_column_tile(self, place: Place, tile: Array) -> Place:
        owned = jnp.asarray(tile, jnp.int32) * self.shape.columns
        return place._replace(column=jnp.minimum(owned, self.sizes.S - self.shape.columns), owned_column=owned)

    def over_column_tiles(self, place: Place, step: Step, carry: Carry) -> Carry:
        """Loops over the tiles of keys that this tile of queries attends to."""
        mask, rows = self.mask_of_row(place), (place.row, place.row + self.shape.rows)
        some, every = (f(mask, *rows, self.sizes.S) for f in (tiles.key_range, tiles.full_key_range))
        ranges = self._ranges(some, every, self.shape.columns, self.column_tiles)
        return self._over(ranges, functools.partial(self.at_column_tile, place), step, carry)

    def over_row_tiles(self, place: Place, step: Step, carry: Carry) -> Carry:
        """Loops over the tiles of queries that attend to this tile of keys."""
        mask, columns = self.mask_of_row(place), (place.column, place.column + self.shape.columns)
        some, (start, stop) = (f(mask, *columns, self.sizes.T) for f in (tiles.row_range, tiles.full_row_range))
        every = start, jnp.where(self._owns_every_key(place), stop, 0)
        ranges = self._ranges(some, every, self.shape.rows, self.row_tiles)
        return self._over(ranges, functools.partial(self.at_row_tile, place), step, carry)

    def _owns_every_key(self, place: Place) -> Bool[Array, ""]:
        """Whether the tile owns all its keys and none is padding; else every tile of queries needs the mask."""
        lengths, owned = self.inputs.mask.key_lengths, place.column == place.owned_column
        return owned if lengths is None else owned & (place.column + self.shape.columns <= lengths[place.batch])

    # -- slices ---------------------------------------------------------------------------------------------------

    def queries(self, x: Float[Array, "B T N X"], place: Place) -> Float[Array, "P R X"]:
        """Rows of a query-side array, the heads of a group side by side: R = bq * G."""
        features = x.shape[-1]
        start, size = self._queries_slice(place, features)
        x = lax.dynamic_slice(x.reshape(self._grouped(features)), start, size)[0]  # [bq, P, G, X]
        lengths = self.inputs.mask.query_lengths
        if lengths is not None:
            x = jnp.where((self.rows(place) < lengths[place.batch])[:, None, None, None], x, jnp.zeros((), x.dtype))
        return x.transpose(1, 0, 2, 3).reshape(self.shape.heads, -1, features)

    def store_queries(self, into: Array, x: Float[Array, "P R X"], place: Place) -> Array:
        """Writes rows into a query-side array `[B, T, K, G, X]`."""
        start, _ = self._queries_slice(place, x.shape[-1])
        return lax.dynamic_update_slice(into, self._ungroup(x).astype(into.dtype), start)

    def add_queries(self, into: Array, x: Float[Array, "P R X"], place: Place) -> Array:
        start, size = self._queries_slice(place, x.shape[-1])
        return lax.dynamic_update_slice(into, lax.dynamic_slice(into, start, size) + self._ungroup(x), start)

    def keys(self, x: Real[Array, "B S K X"], place: Place) -> Real[Array, "P bk X"]:
        """Rows of a key-side array; 0 beyond the length, because padding may hold NaN and 0 * NaN is NaN."""
        start, size = self._keys_slice(place, x.shape[-1])
        if x.dtype != self.inputs.score_dtype:
            x, start = lax.optimization_barrier((x, start))  # or XLA would convert all of x, before the loop
        x = lax.dynamic_slice(x, start, size)[0]  # [bk, P, X]
        lengths = self.inputs.mask.key_lengths
        if lengths is not None:
            x = jnp.where((self.columns(place) < lengths[place.batch])[:, None, None], x, jnp.zeros((), x.dtype))
        return x.transpose(1, 0, 2)

    def add_keys(self, into: Float[Array, "B S K X"], x: Float[Array, "P bk X"], place: Place) -> Array:
        start, size = self._keys_slice(place, x.shape[-1])
        return lax.dynamic_update_slice(into, lax.dynamic_slice(into, start, size) + x.transpose(1, 0, 2)[None], start)

    def pairs(self, x: Array, place: Place) -> Array:
        """`[#B, #N, #T, #S]` cut to `[1, #PG, #bq, #bk]`; axes of size 1 stay."""
        return lax.dynamic_slice(x, *self._pairs_slice(x, place))

    def add_pairs(self, into: Array, x: Scores, place: Place) -> Array:
        """Adds to `[#B, #N, #T, #S]`, summing over its axes of size 1."""
        x = x.transpose(0, 2, 1, 3).reshape(1, -1, *self._tile)  # [1, PG, bq, bk]
        start, size = self._pairs_slice(into, place)
        x = jnp.sum(x, axis=[axis for axis, n in enumerate(size) if n == 1 and into.shape[axis] == 1], keepdims=True)
        return lax.dynamic_update_slice(into, lax.dynamic_slice(into, start, size) + x, start)

    def heads(self, x: Float[Array, " N"], place: Place) -> Float[Array, "P 1 G 1"]:
        x = lax.dynamic_slice_in_dim(x, place.head * self.sizes.G, self.shape.heads * self.sizes.G)
        return x.astype(self.inputs.score_dtype).reshape(self.shape.heads, 1, self.sizes.G, 1)

    def scales(self, x: Float[Array, "B S K"], place: Place) -> Float[Array, "P 1 1 bk"]:
        """Scales of quantized keys or values; 0 beyond the length, as `keys`."""
        return self.keys(x[..., None], place).astype(self.inputs.score_dtype).reshape(self.shape.heads, 1, 1, -1)

    def query_heads(self, place: Place) -> Array:
        return place.head * self.sizes.G + positions(self.shape.heads * self.sizes.G)

    def rows(self, place: Place) -> Array:
        return place.row + positions(self.shape.rows)

    def columns(self, place: Place) -> Array:
        return place.column + positions(self.shape.columns)

    # -- masks ----------------------------------------------------------------------------------------------------

    def visible(self, place: Place) -> Bool[Array, "#P #bq #G #bk"] | None:
        """True where a query may attend to a key and the tile owns both; None if nothing is removed."""
        rows, columns = self.rows(place), self.columns(place)
        may_attend = masks.visible(self._mask_of_tile(place), rows, columns, self.query_heads(place))
        may_attend = None if may_attend is None else self.split_heads(may_attend)
        if self.sizes.T % self.shape.rows != 0:
            may_attend = _both(may_attend, (rows >= place.owned_row)[None, :, None, None])
        if self.sizes.S % self.shape.columns != 0:
            may_attend = _both(may_attend, (columns >= place.owned_column)[None, None, None, :])
        return may_attend

    def as_tile(self, x: Float[Array, "P R bk"]) -> Scores:
        return x.reshape(self.shape.heads, self.shape.rows, self.sizes.G, self.shape.columns)

    def as_matrix(self, x: Shaped[Array, "P bq G bk"]) -> Shaped[Array, "P R bk"]:
        return x.reshape(self.shape.heads, -1, self.shape.columns)

    # -- steps ----------------------------------------------------------------------------------------------------

    def _ranges(self, some: Range, every: Range, tile: Length, count: Length) -> tuple[Range, Range]:
        """Ranges of tile numbers: tiles with a visible pair, and among them those in which all pairs are visible."""
        start, stop = tiles.tile_range(*some, tile, count)
        full_start = jnp.clip(-(-every[0] // tile), start, stop)
        return (start, stop), (full_start, jnp.clip(every[1] // tile, full_start, stop))

    def _over(self, ranges: tuple[Range, Range], at: Callable[[Array], Place], step: Step, carry: Carry) -> Carry:
        """First the tiles that need no mask, then the others: a mask takes a sixth of the time of a step."""
        (start, stop), (full_start, full_stop) = ranges
        masked = lambda tile, carry: self._masked_step(at(tile), step, carry)
        if self._is_uniform:
            return lax.fori_loop(start, stop, masked, carry)
        carry = lax.fori_loop(full_start, full_stop, lambda tile, carry: step(at(tile), None, carry), carry)
        skipped = full_stop - full_start
        others = lambda tile, carry: masked(jnp.where(tile < full_start, tile, tile + skipped), carry)
        return lax.fori_loop(start, stop - skipped, others, carry)

    @property
    def _is_uniform(self) -> bool:
        """Whether one loop suffices: every tile may need the mask, or none needs it, or there is only one tile."""
        mask = self.inputs.mask
        anywhere = mask.allowed, mask.query_segments, mask.function, mask.query_lengths, mask.ring
        one = self.row_tiles == self.column_tiles == 1
        return one or self._hides_nothing or any(x is not None for x in anywhere)

    @property
    def _hides_nothing(self) -> bool:
        mask = self.inputs.mask
        whole = self.sizes.T % self.shape.rows == 0 and self.sizes.S % self.shape.columns == 0
        return whole and not mask.hides_pairs and mask.key_lengths is None

    def _masked_step(self, place: Place, step: Step, carry: Carry) -> Carry:
        """Skips a tile that a boolean mask, segments or a function hide entirely."""
        may_attend, mask = self.visible(place), self.inputs.mask
        if may_attend is None or all(x is None for x in (mask.allowed, mask.query_segments, mask.function)):
            return step(place, may_attend, carry)
        return lax.cond(jnp.any(may_attend), lambda: step(place, may_attend, carry), lambda: carry)

    # -- details --------------------------------------------------------------------------------------------------

    @property
    def _tile(self) -> tuple[Length, Length]:
        return self.shape.rows, self.shape.columns

    def _grouped(self, features: int) -> tuple[Length, ...]:
        size = self.sizes
        return size.B, size.T, size.K, size.G, features

    def _queries_slice(self, place: Place, features: int) -> tuple[tuple, tuple]:
        size = 1, self.shape.rows, self.shape.heads, self.sizes.G, features
        return (place.batch, place.row, place.head, ZERO, ZERO), size

    def _keys_slice(self, place: Place, features: int) -> tuple[tuple, tuple]:
        return (place.batch, place.column, place.head, ZERO), (1, self.shape.columns, self.shape.heads, features)

    def _pairs_slice(self, x: Array, place: Place) -> tuple[list, list]:
        start = place.batch, place.head * self.sizes.G, place.row, place.column
        size = 1, self.shape.heads * self.sizes.G, *self._tile
        whole = [n == 1 for n in x.shape]
        return [ZERO if one else s for one, s in zip(whole, start)], [1 if one else n for one, n in zip(whole, size)]

    def _ungroup(self, x: Float[Array, "P R X"]) -> Float[Array, "1 bq P G X"]:
        x = x.reshape(self.shape.heads, self.shape.rows, self.sizes.G, x.shape[-1])
        return x.transpose(1, 0, 2, 3)[None]

    def split_heads(self, x: Array) -> Array:
        """`[1, #PG, #bq, #bk]` -> `[#P, #bq, #G, #bk]`."""
        heads = (1, 1) if x.shape[1] == 1 else (self.shape.heads, self.sizes.G)
        return x.reshape(*heads, *x.shape[2:]).transpose(0, 2, 1, 3)

    def mask_of_row(self, place: Place) -> masks.Mask:
        """The mask of one batch row, without the boolean mask of the caller."""
        cut = lambda x: lax.dynamic_slice_in_dim(x, 0 if x.shape[0] == 1 else place.batch, 1)
        function = self.inputs.mask.function
        mask = jax.tree.map(cut, replace(self.inputs.mask, allowed=None, function=None))
        return mask if function is None else replace(mask, function=replace(function, batch=cut(function.batch)))

    def _mask_of_tile(self, place: Place) -> masks.Mask:
        mask, allowed = self.mask_of_row(place), self.inputs.mask.allowed
        cut = lambda x, start, size: None if x is None else lax.dynamic_slice_in_dim(x, start, size, axis=1)
        return replace(
            mask,
            allowed=None if allowed is None else self.pairs(allowed, place),
            query_segments=cut(mask.query_segments, place.row, self.shape.rows),
            key_segments=cut(mask.key_segments, place.column, self.shape.columns),
        )


def _both(may_attend: Array | None, condition: Array) -> Array:
    return condition if may_attend is None else may_attend & condition
