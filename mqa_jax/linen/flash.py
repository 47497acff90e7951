"""`FlashAttention` and `FlashMHA` as `flax.linen` modules."""

import flax.linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mqa_jax.layer.flash import FlashAttentionLayer, FlashMHASettings
from mqa_jax.linen.attention import GroupedQueryAttention
from mqa_jax.linen.random import dropout_key
from mqa_jax.setting_types import check_types


class FlashAttention(FlashAttentionLayer, nn.Module):
    __doc__ = FlashAttentionLayer.__doc__

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()

    __call__ = nn.compact(FlashAttentionLayer.__call__)

    def _dropout_key(self, deterministic: bool | None) -> Array | None:
        return dropout_key(self, deterministic)


class FlashMHA(FlashMHASettings, nn.Module):
    __doc__ = FlashMHASettings.__doc__

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        query: Float[ArrayLike, "B T D"],
        key: Float[ArrayLike, "B S _"] | None = None,
        value: Float[ArrayLike, "B S _"] | None = None,
        *,
        deterministic: bool | None = None,
    ) -> Float[Array, "B T D"]:
        """Key defaults to query, value to key. Returns `[B, T, D]`."""
        attention = GroupedQueryAttention(**self.attention_settings())
        nn.share_scope(self, attention)  # the parameters are ours: query, key, value, out
        out, _, _ = attention(query, inputs_k=key, inputs_v=value, deterministic=deterministic)
        return out
