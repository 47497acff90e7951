"""The terms that the backward pass of every implementation computes once for each row of scores, in plain JAX."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.shapes import LogSumExp, Output


def delta(out: Output, d_out: Output, d_log_sum_exp: LogSumExp) -> Float[Array, "B T N"]:
    """The gradient of a score is weight * (d_weight - delta)."""
    dtype = d_log_sum_exp.dtype
    return jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_log_sum_exp


def d_sinks(sinks: Array | None, normalizer: Normalizer, delta: Float[Array, "B T N"]) -> Array | None:
    """A sink is a score whose value is 0: its gradient is -weight * delta."""
    if sinks is None:
        return None
    return -jnp.sum(_sink_weights(sinks, normalizer) * delta, axis=(0, 1)).astype(sinks.dtype)


def tangent_of_sinks(sinks: Array, tangent: Array, normalizer: Normalizer) -> Float[Array, "B T N"]:
    """What the sinks add to the tangent of the log-sum-exp."""
    return _sink_weights(sinks, normalizer) * tangent.astype(normalizer.highest.dtype)


def _sink_weights(sinks: Array, normalizer: Normalizer) -> Float[Array, "B T N"]:
    """Padding rows have no sink."""
    without = normalizer.highest == -jnp.inf
    return jnp.where(without, 0.0, normalizer.weight(sinks.astype(normalizer.highest.dtype)))
