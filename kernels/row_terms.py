"""What the backward pass computes once for each row of scores, whatever the kernel: plain JAX, float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mqa_jax.shapes import LogSumExp, Output


def delta(out: Output, d_out: Output, d_log_sum_exp: LogSumExp) -> Float[Array, "B T N"]:
    """The gradient of a score is weight * (d_weight - delta)."""
    dtype = d_log_sum_exp.dtype
    return jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - d_log_sum_exp


def d_sinks(sinks: Array | None, log_sum_exp: LogSumExp, delta: Float[Array, "B T N"]) -> Array | None:
    """A sink is a score whose value is 0: its gradient is -weight * delta, where rows without keys have weight 0."""
    if sinks is None:
        return None
    weight = jnp.exp(sinks.astype(log_sum_exp.dtype)[None, None] - log_sum_exp)
    return -jnp.sum(weight * delta, axis=(0, 1))
