"""What one program of a Triton kernel sees: reading and writing tiles, and the scores of a tile.

Every read and write names the entries that exist, unless a tile is known to lie inside the array: nothing here relies
on the compiler to keep a block inside. Features come in pieces of a power of two (80 = 64 + 16), so no head size is
padded to the next one.

Tiles are `[bq, bk]`, queries x keys, in the forward pass and for dQ. For dK and dV they are transposed, `[bk, bq]`, so
that keys are the rows of all four matrix products: then 64 keys are enough for Hopper's wgmma, whatever bq.
"""

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mqa_jax import dropout, masks
from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels.tile_config import TileConfig
from mqa_jax.kernels.triton_call import (
    LOG2_E,
    divided,
    exp2_of_line,
    load,
    product,
    product_transposed,
    span,
    store,
)
from mqa_jax.kernels.triton_precision import products_of

Scores = Float[Array, "..."]  # [bq, bk], or transposed
Pieces = tuple[Array, ...]  # of the features of a tile, each [tile, power of two]


class Piece(NamedTuple):
    """Some features: the first, how many a tile holds, and how many of these exist."""

    start: int
    width: int
    existing: int


def pieces(features: int, widest: int) -> Iterator[Piece]:
    """Powers of two from 16 on that cover the features; only the last one may be wider than what exists."""
    start, left = 0, -(-features // 16) * 16
    while left:
        width = min(widest, 1 << (left.bit_length() - 1))
        yield Piece(start, width, min(width, features - start))
        start, left = start + width, left - width


def zeros(tile: int, features: int, config: TileConfig) -> Pieces:
    """Sums that grow, float32."""
    return tuple(jnp.zeros((tile, width), jnp.float32) for _, width, _ in pieces(features, config.features))


class Place(NamedTuple):
    """Where a tile lies: its first query and key, int32 scalars."""

    row: Array
    column: Array


@dataclass(frozen=True)
class Program:
    """The inputs (references to whole arrays) for one batch row and one query head.

    Attributes: group, how many neighbouring rows are heads of one query; see `triton_decode`. Then `head` is the
    key/value head, and ALiBi slopes and sinks are `[K, rows]`.
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

    def number(self, n: int) -> Array:
        """A number as an index: interpret mode has no rule for a literal, and the compiler sees through this."""
        return 0 * self.batch + n

    # -- places ---------------------------------------------------------------------------------------------------

    def rows(self, place: Place) -> Array:
        """Numbers of the queries, `[bq, 1]`, or `[1, bq]` if transposed."""
        return place.row + _axis(self.config.rows, 1 if self.transposed else 0)

    def queries_of_rows(self, place: Place) -> Array:
        rows = self.rows(place)
        return rows if self.group == 1 else divided(rows, self.group)[0]

    def columns(self, place: Place) -> Array:
        """Numbers of the keys, across `rows`."""
        return place.column + _axis(self.config.columns, 0 if self.transposed else 1)

    def query_positions(self, place: Place) -> Array:
        return self.queries_of_rows(place) + self.query_offset()

    def key_positions(self, place: Place) -> Array:
        columns, ring = self.columns(place), self.inputs.mask.ring
        return columns if ring is None else masks.ring_positions(columns, load(ring.lengths, self.batch), ring.slots)

    def row_limit(self) -> Any:
        """Queries from there on do not exist, or are padding."""
        lengths = self.inputs.mask.query_lengths
        return self.sizes.T if lengths is None else jnp.minimum(load(lengths, self.batch), self.sizes.T)

    def column_limit(self) -> Any:
        lengths = self.inputs.mask.key_lengths
        return self.sizes.S if lengths is None else jnp.minimum(load(lengths, self.batch), self.sizes.S)

    def ragged_rows(self) -> bool:
        """Whether some tile of queries may hold rows that do not exist, or are padding."""
        return self.sizes.T % self.config.rows != 0 or self.inputs.mask.query_lengths is not None

    def ragged_columns(self) -> bool:
        return self.sizes.S % self.config.columns != 0 or self.inputs.mask.key_lengths is not None

    def may_mask(self) -> bool:
        """Whether some tile has pairs that the mask hides or that do not exist (on the owned axis these do no harm)."""
        ragged = self.ragged_rows() if self.transposed else self.ragged_columns()
        return self.inputs.mask.hides_pairs or ragged

    # -- reading and writing --------------------------------------------------------------------------------------

    def queries(self, x: Any, start: Array, masked: bool) -> Pieces:
        """A tile of a query-side array `[B, T, N, X]`; 0 where a query does not exist, or is padding."""
        limit = self.row_limit() if masked and self.ragged_rows() else None
        return tuple(
            self._read(x, start, self.config.rows, self.head, piece, limit)
            for piece in pieces(x.shape[-1], self.config.features)
        )

    def keys(self, x: Any, start: Array, masked: bool) -> Pieces:
        """A tile of a key-side array `[B, S, K, X]`; 0 where a key does not exist, or is padding."""
        limit = self.column_limit() if masked and self.ragged_columns() else None
        tile = self.config.columns
        return tuple(
            self._read(x, start, tile, self.kv_head, piece, limit)
            for piece in pieces(x.shape[-1], self.config.features)
        )

    def scales(self, x: Any, start: Array, masked: bool) -> Float[Array, "1 bk"]:
        """A tile of `[B, S, K]`, scales of quantized keys or values; 0 where there is none."""
        where = start + _line(self.config.columns) < self.column_limit() if masked and self.ragged_columns() else None
        return load(x, self.batch, span(start, self.config.columns), self.kv_head, where=where)[None]

    def _read(self, x: Any, start: Array, tile: int, head: Array, piece: Piece, limit: Any) -> Array:
        where = _inside(start, tile, limit, piece)
        return load(x, self.batch, span(start, tile), head, span(piece.start, piece.width), where=where)

    def row_numbers(self, x: Any, start: Array, masked: bool, other: float = 0.0) -> Float[Array, " bq"]:
        """A tile of `[B, N, T]`, one number for each query; `other` where there is none."""
        rows = start + _line(self.config.rows)
        where = rows < self.row_limit() if masked and self.ragged_rows() else None
        numbers = load(x, self.batch, self.head, span(start, self.config.rows), where=where)
        return numbers if where is None or other == 0.0 else jnp.where(where, numbers, other)

    def store_rows(self, into: Any, values: Pieces, start: Array, *leading: Array) -> None:
        """Writes a tile of `[..., B, T, N, X]`."""
        limit = self.sizes.T if self.sizes.T % self.config.rows else None
        for value, piece in zip(values, pieces(into.shape[-1], self.config.features)):
            where = _inside(start, self.config.rows, limit, piece)
            index = *leading, self.batch, span(start, self.config.rows), self.head, span(piece.start, piece.width)
            store(into, value, *index, where=where)

    def store_columns(self, into: Any, values: Pieces, start: Array, *leading: Array) -> None:
        """Writes a tile of `[..., B, S, K, X]`."""
        limit = self.sizes.S if self.sizes.S % self.config.columns else None
        for value, piece in zip(values, pieces(into.shape[-1], self.config.features)):
            where = _inside(start, self.config.columns, limit, piece)
            index = *leading, self.batch, span(start, self.config.columns), self.kv_head
            store(into, value, *index, span(piece.start, piece.width), where=where)

    def store_row_numbers(self, into: Any, numbers: Float[Array, " bq"], start: Array, *leading: Array) -> None:
        """Writes a tile of `[..., B, N, T]`."""
        tile = self.config.rows
        where = start + _line(tile) < self.sizes.T if self.sizes.T % tile else None
        store(into, numbers, *leading, self.batch, self.head, span(start, tile), where=where)

    def pairs(self, x: Any, place: Place, masked: bool) -> Array:
        """A tile of `[#B, #N, #T, #S]`, whose axes of size 1 stay; 0 where a pair does not exist."""
        each_row, each_column = x.shape[2] > 1 or self._mixes_heads(x), x.shape[3] > 1
        row_exists = column_exists = None
        if each_row and self._overhang(masked, self.sizes.T, self.config.rows, self.ragged_rows()):
            row_exists = place.row + _line(self.config.rows) < self.row_limit()
        if each_column and self._overhang(masked, self.sizes.S, self.config.columns, self.ragged_columns()):
            column_exists = place.column + _line(self.config.columns) < self.column_limit()
        where = _outer(row_exists, column_exists, (self.config.rows, self.config.columns), each_row, each_column)
        tile = load(x, *self._index_of_pairs(x, place), where=where)
        tile = tile.reshape(self.config.rows if each_row else 1, self.config.columns if each_column else 1)
        return tile.T if self.transposed else tile

    def _mixes_heads(self, x: Any) -> bool:
        """Whether rows of one tile lie in different heads of `[#B, #N, #T, #S]`."""
        return self.group > 1 and x.shape[1] > 1

    def _index_of_pairs(self, x: Any, place: Place) -> tuple[Any, ...]:
        head, row, column = self.head, span(place.row, self.config.rows), span(place.column, self.config.columns)
        if self.group > 1 and (x.shape[1] > 1 or x.shape[2] > 1):  # a query and a head for each row, not one span
            row, member = divided(place.row + _line(self.config.rows), self.group)
            head = head * self.group + member
            if x.shape[3] > 1:
                head, row = head[:, None], row[:, None]
                column = (place.column + _line(self.config.columns))[None]
        return tuple(self.number(0) if n == 1 else i for n, i in zip(x.shape, (self.batch, head, row, column)))

    # -- scores ---------------------------------------------------------------------------------------------------

    @property
    def bare(self) -> bool:
        """Whether a score is scale * q . k and nothing else. Then the scale is folded into the exponential."""
        operands = self.inputs.operands
        added = operands.bias is not None or operands.alibi_slopes is not None
        return not added and self.inputs.logits_soft_cap is None and self.inputs.scale > 0

    @property
    def unit(self) -> float:
        """What a score as `scores` returns it has to be multiplied by to become a score."""
        return self.inputs.scale if self.bare else 1.0

    def scores(self, raw: Scores, place: Place, masked: bool) -> tuple[Scores, Scores | None]:
        """From q . k to scores / `unit`, -inf where hidden; and tanh of the soft cap."""
        inputs, operands, tanh = self.inputs, self.inputs.operands, None
        if operands.key_scale is not None:
            raw = raw * self.scales(operands.key_scale, place.column, masked)
        if not self.bare:
            raw = raw * inputs.scale
        if inputs.logits_soft_cap is not None:
            tanh = jnp.tanh(raw / inputs.logits_soft_cap)
            raw = tanh * inputs.logits_soft_cap
        if operands.bias is not None:
            raw = raw + self.pairs(operands.bias, place, masked).astype(jnp.float32)
        if operands.alibi_slopes is not None:
            raw = raw - self.of_heads(operands.alibi_slopes, place.row) * self.distance(place)
        visible = self.visible(place) if masked else None
        return raw if visible is None else jnp.where(visible, raw, -jnp.inf), tanh

    def of_heads(self, x: Any, row: Array) -> Float[Array, "..."]:
        """One number of slopes or sinks, or one for each row."""
        if len(x.shape) == 1:
            return load(x, self.head).astype(jnp.float32)
        line = row + _line(self.config.rows)
        return load(x, self.head, span(row, self.config.rows), where=line < self.sizes.T)[:, None]

    def query_offset(self) -> Any:
        offset = self.inputs.mask.query_offset
        return 0 if offset is None else load(offset, self.batch if offset.shape[0] > 1 else self.number(0))

    def distance(self, place: Place) -> Float[Array, "..."]:
        """|query position - key position|"""
        return masks.apart(self.query_positions(place), self.key_positions(place)).astype(jnp.float32)

    def visible(self, place: Place) -> Bool[Array, "..."] | None:
        """True where a pair exists and the mask leaves it (`mqa_jax.masks`). Padded queries are left to the caller."""
        mask, conditions = self.inputs.mask, []
        if mask.is_causal or mask.window is not None:
            conditions += masks.in_reach(mask, self.query_positions(place), self.key_positions(place))
        if self.ragged_columns():
            conditions.append(self.columns(place) < self.column_limit())
        if mask.query_segments is not None:
            conditions.append(self._row_ids(place) == self._column_ids(place))
        if mask.allowed is not None:
            conditions.append(self.pairs(mask.allowed, place, True))
        visible = None
        for condition in conditions:
            visible = condition if visible is None else visible & condition
        return visible

    def weights(
        self, scores: Scores, shift: Float[Array, "..."], log_total: Float[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """exp(score - shift - log_total), the first two / `unit`; the last two broadcast."""
        if not self.bare or self.inputs.dtype == jnp.float32:
            return self.exp_of_difference(scores, shift, log_total)
        slope = self.unit * LOG2_E  # one instruction less, and an error that 16-bit weights do not show
        total = 0.0 if log_total is None else log_total * LOG2_E
        return exp2_of_line(scores, slope, shift * -slope - total, self.interpret)

    def exp_of_difference(
        self, scores: Scores, shift: Float[Array, "..."], log_total: Float[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """The same, and exactly 1 where both are equal, so that rescaling a sum many times by 1 leaves it as it is.

        Subtracting first also keeps finfo.min, the usual bias of a pair that is not wanted, from overflowing.
        """
        total = jnp.zeros_like(shift) if log_total is None else log_total * -LOG2_E
        return exp2_of_line(scores - shift, self.unit * LOG2_E, total, self.interpret)

    def drop(self, weights: Float[Array, "..."], place: Place) -> Float[Array, "..."]:
        """Dropout, of the weights or of their gradients."""
        spec = self.inputs.dropout
        if spec is None:
            return weights
        seed: Any = load(spec.seed, self.number(0)), load(spec.seed, self.number(1))  # no kernel can take it apart
        loaded, batch = replace(spec, seed=seed), load(spec.batch, self.batch)
        head = self.head
        if self.group > 1:
            head = head * self.group + divided(self.rows(place), self.group)[1]
        kept = dropout.keep(loaded, batch, head, self.queries_of_rows(place), self.columns(place))
        return jnp.where(kept, weights * spec.scale, 0.0)

    def product(self, left: Array, right: Array) -> Array:
        """Left @ right, in the dtype of the left."""
        return product(left, _widened(right, left.dtype), products_of(self.inputs))

    def dot(self, left: Pieces, right: Pieces) -> Float[Array, "..."]:
        """Left @ right.T, summed over the pieces of the features, in the dtype of the left."""
        precision = products_of(self.inputs)
        products = [product_transposed(one, _widened(other, one.dtype), precision) for one, other in zip(left, right)]
        return functools.reduce(operator.add, products)

    # -- details --------------------------------------------------------------------------------------------------

    def _overhang(self, masked: bool, length: int, tile: int, ragged: bool) -> bool:
        """Whether a tile of pairs may leave the array: tiles without mask may do so on the axis that a program owns."""
        return ragged if masked else length % tile != 0

    def _row_ids(self, place: Place) -> Array:
        ids, line = self.inputs.mask.query_segments, place.row + _line(self.config.rows)
        where = line < self.sizes.T if self.sizes.T % self.config.rows else None
        ids = load(ids, self.batch, span(place.row, self.config.rows), where=where)
        return ids[None] if self.transposed else ids[:, None]

    def _column_ids(self, place: Place) -> Array:
        ids, line = self.inputs.mask.key_segments, place.column + _line(self.config.columns)
        where = line < self.sizes.S if self.sizes.S % self.config.columns else None
        ids = load(ids, self.batch, span(place.column, self.config.columns), where=where)
        return ids[:, None] if self.transposed else ids[None]


def _widened(x: Array, dtype: Any) -> Array:
    """Keys or values in the dtype of a product.

    From float8 to bfloat16 the compiler would go by float16, and from there with one F2F for each number, on the unit
    that has the exponentials to do. By float32 it is an addition, and one packing instruction for each two.
    """
    if x.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        x = x.astype(jnp.float16).astype(jnp.float32)
    return x.astype(dtype)


def _line(length: int) -> Array:
    return lax.iota(jnp.int32, length)


def _axis(length: int, axis: int) -> Array:
    """0, 1, 2, ... along one of two axes."""
    return lax.broadcasted_iota(jnp.int32, (length, 1) if axis == 0 else (1, length), axis)


def _inside(start: Array, tile: int, limit: Any, piece: Piece) -> Bool[Array, "tile width"] | None:
    """True where both the row and the feature exist; None where all do."""
    rows = None if limit is None else (start + _axis(tile, 0)) < limit
    features = None if piece.existing == piece.width else _axis(piece.width, 1) < piece.existing
    if rows is None and features is None:
        return None
    both: Any = features if rows is None else rows if features is None else rows & features
    return jnp.broadcast_to(both, (tile, piece.width))


def _outer(row: Array | None, column: Array | None, tile: tuple[int, int], each_row: bool, each_column: bool) -> Any:
    """Conditions on rows and on columns as one, on the axes that are there."""
    if not (each_row and each_column):
        return row if each_row else column
    upright = None if row is None else row[:, None]
    both = upright if column is None else column[None] if upright is None else upright & column[None]
    return None if both is None else jnp.broadcast_to(both, tile)
