"""Our attention inside Flax's own modules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from mqa_jax.attention import dot_product_attention


def attention_fn(
    query: Float[ArrayLike, "... T N H"],
    key: Float[ArrayLike, "... S K H"],
    value: Float[ArrayLike, "... S K V"],
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    input_positions: ArrayLike | None = None,
) -> Float[Array, "... T N V"]:
    """`attention_fn` for `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    Every argument that those modules pass is named here, because linen drops the ones that are not. One that cannot be
    honoured raises. Differences: rows that may attend to nothing give 0, not the mean of the values; the softmax is
    always float32; dropout is never shared between rows or heads, so training with it needs `broadcast_dropout=False`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, mqa_jax
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=mqa_jax.attention_fn)
      >>> x = jnp.ones((2, 5, 32))
      >>> layer.apply(layer.init(jax.random.key(0), x), x, mask=nn.make_causal_mask(x[..., 0])).shape
      (2, 5, 32)
    """
    drop = dropout_rate > 0 and not deterministic
    refused = {
        "module (sow_weights=True): fused attention has no weights to sow": module is not None,
        "qk_attn_weights_einsum": qk_attn_weights_einsum is not None,
        "attn_weights_value_einsum": attn_weights_value_einsum is not None,
        "input_positions: rotate queries and keys first, with mqa_jax.Rope": input_positions is not None,
        "broadcast_dropout=True: set broadcast_dropout=False": drop and broadcast_dropout,
    }
    reasons = [reason for reason, applies in refused.items() if applies]
    if reasons:
        raise NotImplementedError(f"mqa_jax.attention_fn cannot honour {'; '.join(reasons)}.")
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    return dot_product_attention(
        query,
        key,
        value,
        bias,
        None if mask is None else _checked_mask(jnp.asarray(mask)),
        is_causal=is_causal,
        dropout_rate=dropout_rate if drop else 0.0,
        dropout_rng=dropout_rng if drop else None,
        precision=precision,
    )


def _checked_mask(mask: jax.Array) -> jax.Array:
    """Flax makes masks of floats, 0 hides. One that is to be added to the scores would hide what it should not."""
    if mask.dtype != jnp.bool_ and not isinstance(mask, jax.core.Tracer) and jnp.any((mask != 0) & (mask != 1)):
        raise ValueError(
            f"mask must be bool, or 0 and 1, 0 hides: mask.dtype={mask.dtype!s}, with other numbers in it. "
            "One that is added to the scores goes to bias=."
        )
    return mask.astype(bool)
