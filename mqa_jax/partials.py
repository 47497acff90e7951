"""Merges the results of attention over several sets of keys into attention over all of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mqa_jax.arguments import array


def merge_partials(
    outs: Float[Array, "P *B T N V"], log_sum_exps: Float[Array, "P *B T N"]
) -> tuple[Float[Array, "*B T N V"], Float[Array, "*B T N"]]:
    """Output and log-sum-exp over all keys, from those over P parts of the keys (Dao et al. 2023, "Flash-Decoding").

    Exact also where a row attends to no key of a part (log-sum-exp -inf) or of any part (output 0, log-sum-exp -inf).

    A sink is an additional score and must be in exactly one part: pass `sinks=` in the call for one of the parts, and
    not in the other calls. Where a row attends to no key of that part, the output of the part is 0 and its log-sum-exp
    is the sink, so the merged result is still exact; a row that attends to no key of any part gets 0 and the sink.

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
