"""`FlashAttention` and `FlashMHA`: the FlashMHA repository's two classes, doing what its README says."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from mqa_jax.attention import dot_product_attention
from mqa_jax.modules import GroupedQueryAttention
from mqa_jax.setting_types import check_types


class FlashAttention(nn.Module):
    """Attention without parameters, on heads that come before positions.

    Attributes:
      causal: a query attends to keys up to its own position, the last query standing at the last key (as flash-attn).
      dropout: dropout rate of the weights; its random key is the `dropout` collection.
      flash: True for the fastest implementation, False for the textbook.
      deterministic: no dropout; may be given to the call instead.
    """

    causal: bool = False
    dropout: float = 0.0
    flash: bool = True
    deterministic: bool | None = None

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        q: Float[ArrayLike, "B N T H"],
        k: Float[ArrayLike, "B ... S H"],
        v: Float[ArrayLike, "B ... S V"],
        mask: ArrayLike | None = None,
        attn_bias: ArrayLike | None = None,
        *,
        deterministic: bool | None = None,
    ) -> Float[Array, "B N T V"]:
        """Mask, bias and causality always combine.

        Args:
          q: queries `[B, N, T, H]`.
          k: keys `[B, K, S, H]`, K dividing N, or `[B, S, H]` for one head shared by all.
          v: values, likewise.
          mask: broadcasts to `[B, N, T, S]`; bool, True = may attend, or float, added to the scores.
          attn_bias: float, broadcasts to `[B, N, T, S]`.
          deterministic: no dropout.

        Returns:
          `[B, N, T, V]`.
        """
        q, k, v = (jnp.asarray(x) for x in (q, k, v))
        if q.ndim != 4 or k.ndim not in (3, 4) or v.ndim not in (3, 4):
            raise ValueError(
                "FlashAttention takes q [B, N, T, H], k and v [B, K, S, H] or [B, S, H]: "
                f"q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape}."
            )
        k, v = (x[:, None] if x.ndim == 3 else x for x in (k, v))
        if mask is not None and jnp.issubdtype(jnp.asarray(mask).dtype, jnp.floating):
            attn_bias, mask = (mask if attn_bias is None else jnp.add(mask, attn_bias)), None
        drop = bool(self.dropout) and not nn.merge_param("deterministic", self.deterministic, deterministic)
        out = dot_product_attention(
            q.swapaxes(1, 2),
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            attn_bias,
            mask,
            is_causal=self.causal,
            query_offset=k.shape[2] - q.shape[2],
            dropout_rate=self.dropout if drop else 0.0,
            dropout_rng=self.make_rng("dropout") if drop else None,
            implementation=None if self.flash else "reference",
        )
        return jnp.swapaxes(out, 1, 2)


class FlashMHA(nn.Module):
    """Multi-head attention of query, key and value inputs, each through its own projection.

    Attributes:
      embed_dim: features, D.
      num_heads: heads, N.
      bias: biases of the projections.
      batch_first: True is the only layout, `[batch, length, features]`.
      dropout: dropout rate of the weights; its random key is the `dropout` collection.
      causal: a query attends to keys up to its own position.
      device: accepted, and explained in a warning: JAX places arrays, not modules.
      dtype: of the parameters, as upstream. Default float32.
      deterministic: no dropout; may be given to the call instead.
      precision: of the matrix products, as in `flax.linen`.
    """

    embed_dim: int
    num_heads: int
    bias: bool = True
    batch_first: bool = True
    dropout: float = 0.0
    causal: bool = False
    device: Any = None
    dtype: DTypeLike | None = None
    deterministic: bool | None = None
    precision: jax.lax.PrecisionLike = None

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
        if not self.batch_first:
            raise NotImplementedError("batch_first=False is not supported: swap the first two axes of the inputs.")
        attention = GroupedQueryAttention(
            self.embed_dim,
            self.num_heads,
            kv_heads=self.num_heads,
            attn_pdrop=self.dropout,
            use_bias=self.bias,
            causal=self.causal,
            device=self.device,
            param_dtype=self.dtype or jnp.float32,
            deterministic=self.deterministic,
            precision=self.precision,
        )
        nn.share_scope(self, attention)  # the parameters are ours: query, key, value, out
        out, _, _ = attention(query, inputs_k=key, inputs_v=value, deterministic=deterministic)
        return out
