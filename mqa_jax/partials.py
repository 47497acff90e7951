"""Attention over several sets of keys, put together from the results over each."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mqa_jax.arguments import array


def merge_partials(
    outs: Float[Array, "P *B T N V"], log_sum_exps: Float[Array, "P *B T N"]
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """Output and log-sum-exp over all keys, from those over P parts of them (Dao et al. 2023, "Flash-Decoding").

    Exact for parts in which a row saw no key, whose log-sum-exp is -inf, and for rows that saw none in any: 0 and -inf.

    Sinks are one more score, and belong to exactly one part: pass `sinks=` with the keys of one part, whichever, and
    not with the others. In a row that sees no key of that part its output is 0 and its log-sum-exp that of the sink,
    so that nothing is lost; a row that sees no key in any has 0 and the sink.

    Args:
      outs: output of each part, `[P, ..., T, N, V]`; any float dtype.
      log_sum_exps: float32 `[P, ..., T, N]`, of `dot_product_attention(..., return_residual=True)`.

    Returns:
      The output `[..., T, N, V]` in the dtype of `outs`, and the log-sum-exp, float32 `[..., T, N]`. Differentiable.

    Raises:
      ValueError: the shapes do not belong together.
    """
    outs, log_sum_exps = array("outs", outs), array("log_sum_exps", log_sum_exps)
    if outs.shape[:-1] != log_sum_exps.shape or outs.ndim < 4 or not outs.shape[0]:
        raise ValueError(
            "outs must be [P, ..., T, N, V] and log_sum_exps [P, ..., T, N], of P parts, at least one: "
            f"{outs.shape=}, {log_sum_exps.shape=}. Stack them with jnp.stack."
        )
    highest = jnp.max(log_sum_exps, axis=0, keepdims=True)
    empty = highest == -jnp.inf
    highest = jnp.where(empty, 0.0, highest)
    weights = jnp.exp(log_sum_exps - highest)
    total = jnp.where(empty, 1.0, jnp.sum(weights, axis=0, keepdims=True))
    out = jnp.sum(outs.astype(weights.dtype) * (weights / total)[..., None], axis=0)
    return out.astype(outs.dtype), jnp.where(empty, -jnp.inf, highest + jnp.log(total))[0]
