"""The normalisations of queries and keys, by upstream's names, each of which is what it says."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def make_norm(norm_type: str, *, epsilon: float, dtype: Any, param_dtype: Any, **place: Any) -> nn.Module:
    """A norm over the last axis. `place`: name or parent of the module.

    The low-precision ones stay in `dtype`; the others take mean and variance in float32, as `flax.linen` does.
    """
    low = norm_type.startswith("low_precision_")
    settings: dict[str, Any] = dict(
        epsilon=epsilon,
        dtype=dtype if low else jnp.promote_types(jnp.float32, dtype or jnp.float32),
        param_dtype=param_dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels; torch takes the mean of (x - E[x])^2
        force_float32_reductions=not low,
    )
    return nn.RMSNorm(**settings, **place) if norm_type.endswith("rmsnorm") else nn.LayerNorm(**settings, **place)
