"""The running softmax of FlashAttention (Milakov & Gimelshein 2018; FlashAttention-2, arXiv 2307.08691, section 3.1).

A state covers the keys processed so far: `highest` score, `total` of exp(score - highest), and `weighted`, the sum of
exp(score - highest) * value. A state of no keys has highest = -inf and the other two 0. All are float32. Scores stay in
base e: multiplying them by log2(e) would turn a bias of finfo.min, which users pass as a mask, into -inf.
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

    @classmethod
    def of(cls, out: Float[Array, "*R V"], normalizer: "Normalizer") -> "State":
        """The state from which `finish` made these results, without a sink; the normalizer is `[*R]`."""
        highest, log_total = (x[..., None] for x in normalizer)
        total = jnp.where(highest == -jnp.inf, 0.0, jnp.exp(log_total))
        return cls(highest, total, out.astype(total.dtype) * total)


class Normalizer(NamedTuple):
    """The denominator of a row's softmax, exp(highest) * exp(log_total), as two numbers; (-inf, 0) in empty rows.

    Their sum, the log-sum-exp, rounds log_total away where |highest| is large: with a bias of finfo.min everywhere the
    backward pass would compute weights of 1 instead of 1 / S, and with scores of some hundreds the rounding error of
    the sum would be a relative error of the weights.
    """

    highest: Float[Array, "..."]
    log_total: Float[Array, "..."]

    @property
    def log_sum_exp(self) -> Float[Array, "..."]:
        return self.highest + self.log_total

    def weight(self, score: Float[Array, "..."]) -> Float[Array, "..."]:
        """The weight of a score; 0 in rows that attend to no key, whose scores are all -inf."""
        return jnp.exp(score - finite(self.highest) - self.log_total)


def finite(highest: Array) -> Array:
    """A shift for exp that is finite also in states of no keys, where -inf - (-inf) would be NaN."""
    return jnp.where(highest == -jnp.inf, 0.0, highest)


def merge(one: State, other: State) -> State:
    """The state of the keys of both."""
    highest = jnp.maximum(one.highest, other.highest)
    first, second = (jnp.exp(state.highest - finite(highest)) for state in (one, other))
    weighted = one.weighted * first + other.weighted * second
    return State(highest, one.total * first + other.total * second, weighted)


def finish(state: State, sink: Float[Array, "*#R 1"] | None = None) -> tuple[Float[Array, "*R V"], Normalizer]:
    """Output, 0 in rows that attend to no key, and its normalizer, `[*R, 1]`.

    A sink is an additional score with a value of 0; -inf means no sink.
    """
    highest, total, weighted = state
    if sink is not None:
        with_sink = jnp.maximum(highest, sink)
        shift = finite(with_sink)
        rescale = jnp.exp(highest - shift)
        highest, total, weighted = with_sink, total * rescale + jnp.exp(sink - shift), weighted * rescale
    total = jnp.where(highest == -jnp.inf, 1.0, total)
    return weighted / total, Normalizer(highest, jnp.log(total))
