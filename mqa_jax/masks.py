"""Which query may attend to which key: the definition of every masking option, for every implementation.

A query has a *position*, `query_offset + t`; a key's position is its index s. All conditions below combine by AND.

is_causal: key position <= query position. With T = 3 queries on S = 5 keys (1 = may attend):

    query_offset=0     query_offset=2 (the last query is at the position of the last key)
      1 0 0 0 0          1 1 1 0 0
      1 1 0 0 0          1 1 1 1 0
      1 1 1 0 0          1 1 1 1 1

and with T = 5 on S = 3, where with query_offset=-2 two queries may attend to no key (their output is 0):

    query_offset=0     query_offset=-2
      1 0 0              0 0 0
      1 1 0              0 0 0
      1 1 1              1 0 0
      1 1 1              1 1 0
      1 1 1              1 1 1

local_window_size=(2, 1): position - 2 <= key position <= position + 1:

      1 1 0 0 0
      1 1 1 0 0
      1 1 1 1 0
      0 1 1 1 1
      0 0 1 1 1

-1 means no limit on that side; local_window_size=(-1, 1) with query_offset=1:

      1 1 1 0 0
      1 1 1 1 0
      1 1 1 1 1

query_seq_lengths=2, key_value_seq_lengths=3 (T = 3, S = 5):   query segments 0 0 1, key segments 0 0 1 1 1:

      1 1 1 0 0                                                  1 1 0 0 0
      1 1 1 0 0                                                  1 1 0 0 0
      0 0 0 0 0                                                  0 0 1 1 1

key_value_ring_lengths=6: the keys are a ring buffer of S = 4 slots to which 6 tokens have been written. The position of
a key is not its index: slot s holds the newest position that is s modulo S, here 4 5 2 3. With is_causal,
query_offset=4 and T = 2:

      1 0 1 1
      1 1 1 1

Positions may use all 32 bits, so the difference of two positions, or the sum of a position and a window, may overflow.
Hence positions are compared, never subtracted, and sums with a window saturate (`plus`, `minus`), which does not change
the result of a comparison.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Integer, UInt32

from mqa_jax.pair_function import PairFunction
from mqa_jax.shapes import BoolMask, Length, Positions

MIN_INT32, MAX_INT32 = -(2**31), 2**31 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """Keys in a ring buffer.

    Attributes:
      lengths: int32 `[B]`, the number of tokens written to it so far; it holds the latest of them.
      slots: static; S.
    """

    lengths: Int[Array, " B"]
    slots: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Everything that removes (query, key) pairs. `None` removes nothing.

    Attributes:
      query_offset: position of the first query, int32 `[#B]`; None is 0 in every row.
      allowed: the caller's boolean mask `[#B, #N, #T, #S]`, True = may attend.
      query_lengths, key_lengths: int32 `[B]`; entries of the array from this index on are padding.
      query_segments, key_segments: integers of one dtype `[B, T]`, `[B, S]`; only equal ids attend to each other.
      function: the caller's condition on batch row, head and positions.
      ring: None where a key's position is its index. With a ring, `key_lengths` are the slots that were written.
      is_causal: static.
      window: static `(left, right)`, each less than MAX_INT32, or None where there is no limit.
    """

    query_offset: Int[Array, "#B"] | None = None
    allowed: BoolMask | None = None
    query_lengths: Int[Array, " B"] | None = None
    key_lengths: Int[Array, " B"] | None = None
    query_segments: Integer[Array, "B T"] | None = None
    key_segments: Integer[Array, "B S"] | None = None
    function: PairFunction | None = None
    ring: Ring | None = None
    is_causal: bool = field(default=False, metadata={"static": True})
    window: tuple[int | None, int | None] | None = field(default=None, metadata={"static": True})

    @property
    def hides_pairs(self) -> bool:
        """Whether it may hide a pair of which neither the query nor the key is padding."""
        parts = self.window, self.allowed, self.query_segments, self.function
        return self.is_causal or any(x is not None for x in parts)

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How many positions to the left and to the right a query may attend to; None is no limit, causal is 0."""
        left, right = self.window or (None, None)
        return left, 0 if self.is_causal else right


def visible(
    mask: Mask, rows: Positions, columns: Positions, heads: Positions | None = None
) -> Bool[Array, "#B #N #T #S"] | None:
    """True where query `rows` may attend to key `columns`; None if nothing is removed.

    Rows and columns are indices into the whole arrays; the arrays in `mask` are already cut down to them. `heads`, the
    numbers of the query heads, are for `mask.function` alone.
    """
    query, key = of_pairs(mask, rows, columns)
    conditions = in_reach(mask, query, key)
    if mask.function is not None:
        assert heads is not None
        conditions.append(mask.function.of_pairs(head=heads, query=query, key=key))
    rows_exist = exist(mask.query_lengths, rows)
    if rows_exist is not None:
        conditions.append(rows_exist[:, None, :, None])
    if mask.key_lengths is not None:
        conditions.append((columns[None] < mask.key_lengths[:, None])[:, None, None, :])
    if mask.query_segments is not None and mask.key_segments is not None:
        conditions.append((mask.query_segments[:, :, None] == mask.key_segments[:, None, :])[:, None])
    if mask.allowed is not None:
        conditions.append(mask.allowed)
    if not conditions:
        return None
    result = conditions[0]
    for condition in conditions[1:]:
        result = result & condition
    return result


def in_reach(mask: Mask, query: Array, key: Array) -> list[Bool[Array, "..."]]:
    """The conditions of a causal mask and a window on positions, which broadcast against each other."""
    left, right = mask.reach
    conditions = []
    if right is not None:
        conditions.append(key <= plus(query, right))
    if left is not None:
        conditions.append(key >= minus(query, left))
    return conditions


def exist(lengths: Int[Array, " B"] | None, rows: Positions) -> Bool[Array, "B T"] | None:
    """False in rows that are padding; None if there are none."""
    return None if lengths is None else rows[None] < lengths[:, None]


def distance(mask: Mask, rows: Positions, columns: Positions) -> UInt32[Array, "#B 1 T S"]:
    """|query position - key position|"""
    return apart(*of_pairs(mask, rows, columns))


def apart(query: Array, key: Array) -> UInt32[Array, "..."]:
    """|query - key| of any two int32."""
    return (jnp.maximum(query, key) - jnp.minimum(query, key)).astype(jnp.uint32)


def plus(x: int | Array, n: Length) -> Array:
    """The sum, or MAX_INT32 where the sum exceeds it; n >= 0."""
    n = _number(n)
    return jnp.minimum(x, MAX_INT32 - n) + n


def minus(x: int | Array, n: Length) -> Array:
    """The difference, or MIN_INT32 where the difference is less; n >= 0."""
    n = _number(n)
    return jnp.maximum(x, MIN_INT32 + n) - n


def _number(n: Length) -> int | Array:
    """A symbol of `jax.export` as an array: JAX would add MIN_INT32 to its constant, which would exceed 32 bits."""
    return n if isinstance(n, int) else jnp.asarray(n).astype(jnp.int32)


def of_pairs(mask: Mask, rows: Positions, columns: Positions) -> tuple[Int[Array, "#B 1 T 1"], Int[Array, "#B 1 1 S"]]:
    """The positions of queries and keys."""
    offset = jnp.zeros(1, jnp.int32) if mask.query_offset is None else mask.query_offset
    query = rows[None] + offset[:, None]  # [#B, T]
    return query[:, None, :, None], key_positions(mask, columns)[:, None, None, :]


def key_positions(mask: Mask, columns: Positions) -> Int[Array, "#B X"]:
    """Positions of keys by their index; negative in slots of a ring that were never written."""
    if mask.ring is None:
        return columns[None]
    return ring_positions(columns[None], mask.ring.lengths[:, None], mask.ring.slots)


def ring_positions(slot: Array, length: Array, slots: int) -> Array:
    """The position that a slot holds after `length` tokens: the newest that is equal to it modulo `slots`."""
    newest = length - 1
    of_newest = lax.rem(newest, jnp.asarray(slots, newest.dtype))
    return slot + ((newest - of_newest) - jnp.where(slot > of_newest, slots, 0))
