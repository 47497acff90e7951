"""What is computed: one call of attention, with what models do to it, and how much work it is at least."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

import mqa_jax
from benchmarks.candidate import NotApplicable
from benchmarks.model_shapes import ModelShape
from mqa_jax.shapes import positions

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"


@dataclass(frozen=True)
class Problem:
    """One call of attention; the letters are those of `mqa_jax.shapes`.

    Attributes:
      gradients: whether the gradients of sum(weights * output) for query, key and value are computed too.
      window: how many keys a query sees, its own included; None for all.
      alibi: whether scores fall with distance.
      documents: how many, all of one length, are packed into each row; they do not see each other.
      dropout: its rate.
      key_dtype: of keys and values, if not `dtype`; in 8 bits they come with scales.

    With fewer queries than keys it continues what is cached: the last query sees the last key. One query is a step of
    decoding, more are a chunk of a prompt.
    """

    batch: int  # B
    queries: int  # T
    keys: int  # S
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    is_causal: bool = False
    gradients: bool = False
    dtype: str = "float32"
    window: int | None = None
    alibi: bool = False
    documents: int = 1
    dropout: float = 0.0
    key_dtype: str | None = None

    def __str__(self) -> str:
        words = [
            f"B={self.batch} T={self.queries} S={self.keys} N={self.heads} K={self.kv_heads} H={self.head_dim}",
            "causal" if self.is_causal else "",
            "" if self.window is None else f"window={self.window}",
            "ALiBi" if self.alibi else "",
            f"documents={self.documents}" if self.documents > 1 else "",
            f"dropout={self.dropout}" if self.dropout else "",
            self.dtype if self.key_dtype is None else f"{self.dtype}/{self.key_dtype}",
        ]
        return " ".join(filter(None, words))

    @property
    def continues(self) -> bool:
        """Whether there are keys before the first query."""
        return self.queries < self.keys

    def at_length(self, length: int) -> "Problem":
        """One row of this many tokens, or of what continues all rows; chunks and windows shrink with them."""
        shrunk = lambda size: -(-size * length // self.keys)
        window = None if self.window is None else shrunk(self.window)
        batch = self.batch if self.continues else 1
        return replace(self, batch=batch, queries=shrunk(self.queries), keys=length, window=window)

    def small(self) -> "Problem":
        """Small enough for interpret mode: fewer heads and features as well."""
        kv_heads = min(self.kv_heads, 2)
        heads = kv_heads * min(self.heads // self.kv_heads, 2)
        few = replace(self.at_length(40), batch=min(self.batch, 2) if self.continues else 1)
        return replace(few, heads=heads, kv_heads=kv_heads, head_dim=self.head_dim // 4)

    # -- how much work ------------------------------------------------------------------------------------------------

    @property
    def pairs(self) -> float:
        """Of a query and a key, in one head, that the mask leaves: about, as a causal one is said to leave half."""
        length, keys = self.queries // self.documents, self.keys // self.documents
        if self.window is not None:
            cut_off = max(0, self.window - (keys - length))  # queries that have fewer keys before them than the window
            return self.documents * (length * self.window - cut_off**2 / 2)
        return self.documents * (length * keys - (length**2 / 2 if self.is_causal else 0))

    @property
    def flops(self) -> float:
        """4 * B * N * pairs * H for two products; with gradients 3.5 times that: five more, whoever needs more.

        FlashAttention counts so.
        """
        forward = 4 * self.batch * self.heads * self.pairs * self.head_dim
        return 3.5 * forward if self.gradients else forward

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values, and of their scales, that are in sight of some query."""
        token = 2 * self.head_dim * jnp.dtype(self.key_dtype or self.dtype).itemsize + (8 if self.key_dtype else 0)
        in_sight = min(self.keys, self.keys if self.window is None else self.window + self.queries - 1)
        return self.batch * in_sight * self.kv_heads * token

    @property
    def bytes(self) -> int:
        """What has to be read and written at least: `cache_bytes`, query and output.

        With gradients keys and values twice more (read, and their gradients written), and of the size of the query
        four more: query, output and its cotangent read, and a gradient written.
        """
        query = self.batch * self.queries * self.heads * self.head_dim * jnp.dtype(self.dtype).itemsize
        return 3 * self.cache_bytes + 6 * query if self.gradients else self.cache_bytes + 2 * query

    @property
    def score_bytes(self) -> int:
        """Of one float32 array of all scores, which a plain computation has several of."""
        return 4 * self.batch * self.heads * self.queries * self.keys

    # -- its numbers and options --------------------------------------------------------------------------------------

    @property
    def results(self) -> int:
        return 4 if self.gradients else 1

    def shapes(self) -> list[tuple[int, ...]]:
        """Of query, key, value and the weights of the output."""
        query = (self.batch, self.queries, self.heads, self.head_dim)
        key = (self.batch, self.keys, self.kv_heads, self.head_dim)
        return [query, key, key, query]

    def arrays(self) -> list[Float[np.ndarray, "B tokens heads H"]]:
        rng = np.random.default_rng(0)
        return [rng.standard_normal(shape, dtype=np.float32) for shape in self.shapes()]

    def options(self) -> dict[str, Any]:
        """Of `mqa_jax.dot_product_attention`."""
        ids = self.ids() if self.documents > 1 else None
        return dict(
            is_causal=self.is_causal,
            local_window_size=self.sides(),
            query_offset=self.keys - self.queries,
            alibi_slopes=mqa_jax.alibi_slopes(self.heads) if self.alibi else None,
            query_segment_ids=ids,
            key_value_segment_ids=ids,
            dropout_rate=self.dropout,
            dropout_rng=jax.random.key(0) if self.dropout else None,
        )

    def sides(self) -> tuple[int, int] | None:
        return None if self.window is None else (self.window - 1, 0)

    def ids(self) -> Int[Array, "B T"]:
        """Which document a token belongs to."""
        ids = positions(self.queries) // -(-self.queries // self.documents)
        return jnp.broadcast_to(ids, (self.batch, self.queries))

    def distances(self) -> Int[Array, "T S"]:
        """Position of the query - position of the key."""
        return positions(self.queries)[:, None] + (self.keys - self.queries) - positions(self.keys)

    def mask(self) -> Bool[Array, "1 1 T S"] | None:
        """All that is hidden, for peers that have no words for it; None where nothing is."""
        distance, left = self.distances(), []
        if self.is_causal:
            left.append(distance >= 0)
        if self.window is not None:
            left.append((distance >= 0) & (distance < self.window))
        if self.documents > 1:
            ids = self.ids()[0]
            left.append(ids[:, None] == ids)
        return jnp.all(jnp.stack(left), axis=0)[None, None] if left else None

    def bias(self) -> Float[Array, "1 N T S"] | None:
        """ALiBi, for peers that do not know it."""
        if not self.alibi:
            return None
        return (-mqa_jax.alibi_slopes(self.heads)[:, None, None] * jnp.abs(self.distances()).astype(jnp.float32))[None]

    def needs_no(self, *names: str) -> None:
        """Raises for the first of these options that the problem has."""
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise NotApplicable(f"it has no {name}")


def attention_of(shape: ModelShape, batch: int, queries: int, keys: int | None = None, **options: Any) -> Problem:
    """That of a layer of a model; with fewer queries than keys it continues what is cached."""
    keys = keys or queries
    return Problem(
        batch,
        queries,
        keys,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        **{"is_causal": queries > 1, "window": shape.window, "alibi": shape.alibi, **options},
    )
