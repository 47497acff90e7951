"""A function of the caller on pairs of queries and keys, and the arrays that it reads.

`score_fn` and `mask_fn` of `mqa_jax.dot_product_attention` (the idea is that of FlexAttention: Dong et al. 2024, arXiv
2412.05496). Every implementation calls them on its own tiles, so they must be elementwise: numbers of batch rows, heads
and positions come in shapes that broadcast against each other and against the scores, and nothing else is known of
these shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PairFunction:
    """A function and its arrays.

    Attributes:
      batch: int32 `[B]`, the number of each batch row.
      arrays: of any shapes; None in the place of an array that is in `Operands.score_arrays`.
      function: static; `function([score,] batch, head, query position, key position, *arrays)`.
    """

    batch: Int[Array, " B"]
    arrays: tuple[Any, ...] = field(metadata={"for_all_rows": True})
    function: Callable[..., Any] = field(metadata={"static": True})

    def split(self) -> tuple["PairFunction", tuple[Array, ...] | None]:
        """Without its floating point arrays, and these, which are differentiable; None if there are none."""
        is_float = [jnp.issubdtype(x.dtype, jnp.floating) for x in self.arrays]
        others = tuple(None if apart else x for apart, x in zip(is_float, self.arrays))
        return replace(self, arrays=others), tuple(x for apart, x in zip(is_float, self.arrays) if apart) or None

    def joined(self, floats: tuple[Any, ...] | None) -> "PairFunction":
        """The inverse of `split`."""
        left = iter(floats or ())
        return replace(self, arrays=tuple(next(left) if x is None else x for x in self.arrays))

    def with_first(self, *, head: Array | int = 0, position: Array | int = 0, of_scores: bool) -> "PairFunction":
        """For a part of the heads and positions, of which the first have these numbers among all of them."""
        first = jnp.asarray(head, jnp.int32), jnp.asarray(position, jnp.int32)
        return replace(self, arrays=(*first, *self.arrays), function=_NumberedFrom(self.function, of_scores))

    def of_pairs(self, *score: Array, head: Array, query: Array, key: Array) -> Array:
        """The result for scores `[B, N, T, S]`, whose axes it may share; `head` is `[N]`, `query` `[#B, 1, T, 1]`."""
        batch, head = self.batch[:, None, None, None], head[:, None, None]
        result = jnp.asarray(self.function(*score, batch, head, query, key, *self.arrays))
        return result.reshape((1,) * (4 - result.ndim) + result.shape)


@dataclass(frozen=True)
class _NumberedFrom:
    """The function with the numbers of the first head and position as additional arrays, the first two."""

    function: Callable[..., Any]
    of_scores: bool

    def __call__(self, *arguments: Any) -> Any:
        score, others = arguments[: self.of_scores], arguments[self.of_scores :]
        batch, head, query, key, first_head, position, *arrays = others
        return self.function(*score, batch, head + first_head, query + position, key + position, *arrays)


def derivative(function: Callable[[Array], Array], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Of an elementwise function, at each entry of x."""
    return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]
