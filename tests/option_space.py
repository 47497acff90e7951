"""Every option of `dot_product_attention`, what may be chosen for each, and problems that hold what was chosen.

What is chosen decides which program is compiled: that an option is given, the shape of an array, a window. The values
of its arrays (lengths, offsets, ids of segments, seeds) do not; `problem` draws them so that masks end inside a tile,
on its boundary, at 0 and at the full length.
"""

import dataclasses
import math
from typing import Any

import covering
import jax
import jax.numpy as jnp
import numpy as np
import oracle

# Axes of a bias or a mask that are not shared: Z leading ones (z: all but the first), heads, rows, columns.
_PAIRS = (None, "ZNTS", "TS", "ZS", "zNT", "ZN")

OPTIONS: covering.Choices = dict(
    is_causal=(False, True),
    query_offset=(None, "shared", "each row"),
    window=(None, "past", "left", "right", "both", "future"),
    key_lengths=(False, True),
    bias=_PAIRS,
    alibi_slopes=(False, True),
    soft_cap=(None, 2.0),
    sinks=(False, True),
    dropout=(False, True),
    scale=(None, 0.3, -0.3),
    score_fn=(False, True),
)
# With any of these plain XLA takes one loop, with the mask, for all tiles: they lead past what the others can break.
LEADING_PAST: covering.Choices = dict(
    mask=(None, "ZNTS", "TS", "ZS", "zNT"),
    mask_fn=(False, True),
    segments=(False, True),
    query_lengths=(False, True),
    ring=(False, True),
)
HEADS = (4, 2), (2, 2), (3, 1), (1, 1)  # GQA, MHA, MQA, one head
BATCHES = (2,), (), (2, 2)  # leading axes
FEATURES = (8, 8), (5, 12)  # of queries and keys, of values
VALUE_SETS = 4  # of `problem`: ends inside tiles; on boundaries; 0 and all; one beside a boundary. From 4 on: anything


def relative(score, batch, head, query, key, table, factors):
    """Not linear in the score; a table of each row and head, read beyond both of its ends."""
    return factors[head] * score + table[batch, head, key - query + 20] * jnp.tanh(score)


def beginning_and_neighbours(batch, head, query, key, lengths, width):
    """Some tiles are seen as a whole and some not at all, in between as well; others in each row and head."""
    return (key < lengths[batch]) | (jnp.abs(query - key) < width + 3 * head)


def exists(row: covering.Row) -> bool:
    """A ring says itself how many keys there are."""
    return not (row.get("ring") and row.get("key_lengths"))


def window_of(choice: str | None, tile: tuple[int, int]) -> Any:
    """So wide that some tiles lie inside and others do not; and with ends one beside those of tiles."""
    wide = 2 * max(tile) + 1
    windows = {
        None: None,
        "past": (wide, 0),
        "left": (wide, -1),
        "right": (-1, min(tile) - 2),
        "both": wide - min(tile),
        "future": (5, wide),
    }
    return windows[choice]


def problem(row: covering.Row, tile: tuple[int, int], values: int, seed: int = 0) -> oracle.Problem:
    """`tile`: queries and keys, around whose multiples masks end; `values`: one of the VALUE_SETS, or any beyond."""
    return _Drawn(row, tile, values, np.random.default_rng((seed, values))).problem()


class _Drawn:
    """One problem as it is drawn."""

    def __init__(self, row: covering.Row, tile: tuple[int, int], values: int, rng: np.random.Generator):
        self.row, self.tile, self.values, self.rng = row, tile, values, rng
        self.batch, (self.rows, self.columns), (self.heads, self.kv_heads) = row["batch"], row["sizes"], row["heads"]
        self.size = math.prod(self.batch)

    def problem(self) -> oracle.Problem:
        row = self.row
        given: dict[str, Any] = {}
        ring_lengths = self.ring_lengths() if row["ring"] else None
        offset = self.offset(ring_lengths)
        if ring_lengths is not None:
            given["key_value_ring_lengths"] = self.each_row(ring_lengths)
        if offset is not None:
            given["query_offset"] = jnp.int32(offset[0]) if row["query_offset"] == "shared" else self.each_row(offset)
        if row["is_causal"]:
            given["is_causal"] = True
        if row["window"] is not None:
            given["local_window_size"] = window_of(row["window"], self.tile)
        if row["key_lengths"]:
            given["key_value_seq_lengths"] = self.each_row(self.ends(self.columns, self.tile[1], self.size))
        if row["query_lengths"]:
            given["query_seq_lengths"] = self.each_row(self.ends(self.rows, self.tile[0], self.size))
        if row["segments"]:
            given["query_segment_ids"] = self.segments(self.rows, self.tile[0])
            given["key_value_segment_ids"] = self.segments(self.columns, self.tile[1])
        if row["mask"] is not None:
            given["mask"] = self.mask()
        if row["bias"] is not None:
            given["bias"] = self.normal(*self.axes(row["bias"]))
        if row["alibi_slopes"]:
            given["alibi_slopes"] = self.normal(self.heads) * 6 / self.columns
        if row["score_fn"]:
            table = self.normal(self.size, self.heads, 41)
            given |= {"score_fn": relative, "score_fn[1]": table, "score_fn[2]": 1 + self.normal(self.heads) / 4}
        if row["mask_fn"]:
            lengths = jnp.asarray(self.ends(self.columns, self.tile[1], self.size), jnp.int32)
            width = jnp.int32(self.tile[1] // 2)
            given |= {"mask_fn": beginning_and_neighbours, "mask_fn[1]": lengths, "mask_fn[2]": width}
        if row["sinks"]:
            given["sinks"] = self.normal(self.heads)
        if row["dropout"]:
            given |= {"dropout_rate": 0.25, "dropout_rng": jax.random.key(int(self.rng.integers(1 << 30)))}
        given |= {name: row[option] for option, name in _NUMBERS.items() if row[option] is not None}
        sizes: dict[str, Any] = dict(
            batch=self.batch, rows=self.rows, columns=self.columns, heads=self.heads, kv_heads=self.kv_heads
        )
        features, value_features = row["features"]
        made = oracle.random_problem(self.rng, **sizes, features=features, value_features=value_features, **given)
        d_out, d_log_sum_exp = made.cotangents  # of one sign: sums over all queries, as those of sinks, do not cancel
        arrays = made.arrays if self.values % 2 else spoilt(made.arrays, given)
        return dataclasses.replace(made, arrays=arrays, cotangents=(d_out, jnp.abs(d_log_sum_exp) + 2))

    def normal(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape, dtype=np.float32))

    def each_row(self, x: np.ndarray) -> jax.Array:
        return jnp.asarray(x.reshape(self.batch), jnp.int32)

    def axes(self, letters: str) -> tuple[int, ...]:
        lengths = self.heads, self.rows, self.columns
        shape = tuple(n if letter in letters else 1 for letter, n in zip("NTS", lengths))
        first = self.batch[:1] if "Z" in letters else (1,) * len(self.batch[:1])
        leading = (*first, *self.batch[1:]) if set(letters) & set("Zz") else ()
        return (*leading, *shape)

    def ends(self, length: int, tile: int, count: int) -> np.ndarray:
        """Where something ends: from 0 to the length."""
        anywhere = self.rng.integers(0, length + 1, count)
        on_boundary = self.rng.integers(1, max(2, length // tile + 1), count) * tile
        late = np.maximum(anywhere, length - anywhere)
        ends = {
            0: np.where(late % tile, late, late - 1),
            1: np.minimum(on_boundary + np.arange(count) % 2, length),
            2: np.where(np.arange(count) == 0, 0, np.where(np.arange(count) == 1, length, anywhere)),
            3: np.where(np.arange(count) % 2, anywhere, np.minimum(on_boundary + 1, length)),
        }
        if self.values in ends:
            return ends[self.values]
        return np.where(self.rng.random(count) < 0.5, anywhere, ends[int(self.rng.integers(4))])

    def offset(self, ring_lengths: np.ndarray | None) -> np.ndarray | None:
        """Positions of the first query."""
        choice, (rows, columns) = self.row["query_offset"], self.tile
        if choice is None:
            return None
        if ring_lengths is not None:
            return ring_lengths - self.rows if choice == "each row" else np.full(self.size, ring_lengths.min())
        # Under a causal mask the last key that the third tile of queries sees as a whole is the last but one of a tile,
        # and the last one that the second sees at all the first.
        in_front, behind = columns - 2 * rows - 2, columns + -(-2 * rows // columns) * columns
        ways = in_front, behind - 2 * rows + 1, self.columns - self.rows, columns
        if self.values >= VALUE_SETS:
            return self.rng.integers(-self.rows, self.columns, self.size)
        return np.asarray(ways)[(self.values + np.arange(self.size)) % 4]

    def ring_lengths(self) -> np.ndarray:
        """Where offsets differ, any; else so that what a ring holds is what queries 0, 1, ... can see."""
        if self.row["query_offset"] == "each row":
            return self.ends(3 * self.columns, self.tile[1], self.size)
        return self.columns // 2 + self.ends(self.rows, self.tile[0], self.size)

    def segments(self, length: int, tile: int) -> jax.Array:
        """Documents one after the other: ends inside tiles, on boundaries; one that goes on later; a single one."""
        starts = np.asarray([[0.3, 0.65, 0.9]] * self.size) * length + self.rng.integers(0, 3, (self.size, 3))
        cuts = {0: starts, 1: starts // tile * tile, 2: np.asarray([[tile, 2 * tile]] * self.size)}
        if self.values == 3:
            return jnp.zeros((*self.batch, length), jnp.int32)
        anywhere = self.rng.integers(0, length, (self.size, 3))
        documents = (np.arange(length)[:, None] >= cuts.get(self.values, anywhere)[:, None]).sum(-1)
        documents = documents % 2 if self.values % 4 == 2 else documents
        return jnp.asarray(documents.reshape(*self.batch, length), jnp.int32)

    def mask(self) -> jax.Array:
        """One pair in five is hidden, and all pairs of some tiles."""
        shape = self.axes(self.row["mask"])
        allowed = self.rng.random(shape) > 0.2
        rows, columns = (tile if shape[axis] > tile else 0 for axis, tile in zip((-2, -1), self.tile))
        if rows or columns:
            allowed[..., rows : 2 * rows + 1 or None, columns : 2 * columns + 1 or None] = False
        return jnp.asarray(allowed)


def spoilt(arrays: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The same with NaN in what is padding, which nothing may read."""

    def spoil(name: str, lengths: str) -> Any:
        x = arrays[name]
        if lengths not in options:
            return x
        padding = jnp.arange(x.shape[-3]) >= options[lengths][..., None]
        return jnp.where(padding[..., None, None], jnp.nan, x)

    keys = {name: spoil(name, "key_value_seq_lengths") for name in ("key", "value")}
    return arrays | keys | {"query": spoil("query", "query_seq_lengths")}


_NUMBERS = {"soft_cap": "logits_soft_cap", "scale": "scale"}


def table(structure: covering.Choices, options: covering.Choices, leading_past: covering.Choices) -> list[covering.Row]:
    """Every choice alone; every pair; and every pair without `leading_past` but for what of it is in the pair."""
    everything = options | leading_past | structure
    nothing = {option: chosen[0] for option, chosen in leading_past.items()}
    rows = [row | nothing for row in covering.table(options | structure, exists)]
    for most in (1, 2):  # of those that lead past
        exist = lambda row, most=most: exists(row) and sum(bool(row.get(x)) for x in leading_past) <= most
        rows += covering.table(everything, exist, set().union(*map(covering.pairs_of, rows)))
    return [*covering.each_alone(everything), *rows]
