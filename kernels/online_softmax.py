"""The running softmax of FlashAttention (Milakov & Gimelshein 2018; FlashAttention-2, arXiv 2307.08691, section 3.1).

A state covers the keys seen so far: `highest` score, `total` of exp(score - highest), and `weighted`, the sum of
exp(score - highest) * value. A state that saw nothing has highest = -inf and the other two 0. All float32. Scores stay
in base e: multiplying them by log2(e) would turn a bias of finfo.min, which users pass as a mask, into -inf.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mqa_jax.shapes import Length


class State(NamedTuple):
    highest: Float[Array, "*R 1"]
    total: Float[Array, "*R 1"]
    weighted: Float[Array, "*R V"]

    @classmethod
    def empty(cls, *rows: Length, features: int, dtype: DTypeLike = jnp.float32) -> "State":
        full = lambda width, value: jnp.full((*rows, width), value, dtype)
        return cls(full(1, -jnp.inf), full(1, 0.0), full(features, 0.0))


def finite(highest: Array) -> Array:
    """A shift for exp that is harmless where nothing has been seen: -inf - (-inf) would be NaN."""
    return jnp.where(highest == -jnp.inf, 0.0, highest)


def finish(
    state: State, sink: Float[Array, "*#R 1"] | None = None
) -> tuple[Float[Array, "*R V"], Float[Array, "*R 1"]]:
    """Output and log-sum-exp; 0 and -inf where no key was seen. A sink is one more score, with a value of 0."""
    highest, total, weighted = state
    empty = highest == -jnp.inf
    if sink is not None:
        with_sink = jnp.maximum(highest, sink)
        rescale = jnp.exp(highest - with_sink)
        highest, total, weighted = with_sink, total * rescale + jnp.exp(sink - with_sink), weighted * rescale
    total = jnp.where(empty, 1.0, total)
    return weighted / total, jnp.where(empty, -jnp.inf, highest + jnp.log(total))
