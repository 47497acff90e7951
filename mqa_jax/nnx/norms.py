"""Norms of queries and keys as `flax.nnx` modules."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from mqa_jax.linen.norms import make_norm


class Norm(nnx.Module):
    """That of linen, because `nnx.LayerNorm` has no statistics in low precision."""

    def __init__(
        self, features: int, norm_type: str, param_dtype: DTypeLike, scale: Mapping, bias: Mapping, **settings: Any
    ):
        """`scale`, `bias`: metadata of these parameters."""
        self.norm_type, self.param_dtype, self.settings = norm_type, param_dtype, tuple(settings.items())
        self.scale = nnx.Param(jnp.ones(features, param_dtype), **scale)
        has_bias = not norm_type.endswith("rmsnorm")
        self.bias = nnx.Param(jnp.zeros(features, param_dtype), **bias) if has_bias else nnx.data(None)

    def __call__(self, x: Array) -> Array:
        norm = make_norm(self.norm_type, param_dtype=self.param_dtype, parent=None, **dict(self.settings))
        params = {"scale": self.scale[...]} | ({} if self.bias is None else {"bias": self.bias[...]})
        out: Any = norm.apply({"params": params}, x)
        return out
