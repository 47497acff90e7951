"""Attention over several sets of keys, put together from the results over each."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_partials(
    outs: Float[Array, "P *B T N V"], log_sum_exps: Float[Array, "P *B T N"]
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """Output and log-sum-exp over all keys, from those over P parts of them (Dao et al. 2023, "Flash-Decoding").

    Exact for parts in which a row saw no key, whose log-sum-exp is -inf, and for rows that saw none in any: 0 and -inf.

    Args:
      outs: output of each part, `[P, ..., T, N, V]`; any float dtype.
      log_sum_exps: float32 `[P, ..., T, N]`, of `dot_product_attention(..., return_residual=True)`.

    Returns:
      The output `[..., T, N, V]` in the dtype of `outs`, and the log-sum-exp, float32 `[..., T, N]`. Differentiable.
    """
    highest = jnp.max(log_sum_exps, axis=0)
    empty = highest == -jnp.inf
    highest = jnp.where(empty, 0.0, highest)
    weights = jnp.exp(log_sum_exps - highest)
    total = jnp.where(empty, 1.0, jnp.sum(weights, axis=0))
    out = jnp.sum(outs.astype(jnp.float32) * (weights / total)[..., None], axis=0)
    return out.astype(outs.dtype), jnp.where(empty, -jnp.inf, highest + jnp.log(total))
