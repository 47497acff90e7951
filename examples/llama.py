"""A complete Llama-style language model in Flax, whose attention is `mqa_jax.GroupedQueryAttention`.

This one is in `flax.linen`; `llama_nnx.py` is the same model in `flax.nnx`.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

import mqa_jax


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a model; the letters are those of `mqa_jax.shapes`. `cache_dtype`: None is float32.

    `attention_bias`: of queries, keys and values, and of the output unless `attention_out_bias` is set.
    `window`: the number of positions before its own that a query attends to; None is all.

    The last three are only for training: `attn_pdrop` is the dropout rate of the attention weights; with `remat` the
    backward pass recomputes each layer instead of storing its activations; `sequence_axis` says which devices share a
    text.
    """

    vocabulary: int
    layers: int
    dim: int  # D
    hidden: int  # width of the MLP
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    max_length: int
    rope: mqa_jax.Rope | None = mqa_jax.Rope()
    norm_eps: float = 1e-5
    tied_embeddings: bool = True
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    mlp_bias: bool = False
    window: int | None = None
    cache_dtype: str | None = None
    attn_pdrop: float = 0.0
    remat: bool = False
    sequence_axis: mqa_jax.SequenceAxis | None = None

    def attention(self, **settings: Any) -> mqa_jax.GroupedQueryAttention:
        """The attention of each layer."""
        return mqa_jax.GroupedQueryAttention(**self.attention_settings(), **settings)

    def attention_settings(self) -> dict[str, Any]:
        return dict(
            dim=self.dim,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope=self.rope,
            use_bias=self.attention_bias,
            use_out_bias=self.attention_out_bias,
            local_window_size=None if self.window is None else (self.window, 0),
            cache_dtype=self.cache_dtype,
            attn_pdrop=self.attn_pdrop,
            sequence_axis=self.sequence_axis,
        )


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        dense = lambda features, name: nn.Dense(features, use_bias=self.config.mlp_bias, name=name)
        gate, up = jnp.split(dense(2 * self.config.hidden, "gate_up")(x), 2, axis=-1)
        return dense(self.config.dim, "down")(nn.silu(gate) * up)


class Block(nn.Module):
    config: LlamaConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], seq_lengths: Int[Array, " B"] | None) -> Float[Array, "B T D"]:
        config = self.config
        norm = lambda name: nn.RMSNorm(epsilon=config.norm_eps, name=name)
        attention = config.attention(deterministic=self.deterministic, name="attention")
        attended, _, _ = attention(norm("attention_norm")(x), seq_lengths=seq_lengths)
        x = x + attended
        return x + Mlp(config, name="mlp")(norm("mlp_norm")(x))


class Llama(nn.Module):
    """From tokens to logits. With a `cache` collection (`mqa_jax.init_cache`) the tokens follow the cached ones."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        seq_lengths: Int[Array, " B"] | None = None,
        *,
        last_only: bool = False,
        deterministic: bool = True,
    ) -> Float[Array, "B T vocabulary"]:
        """The logits of all tokens, or with `last_only` of the last token of each row, `[B, 1, vocabulary]`.

        `deterministic`: no dropout; if it is False, apply the model with `rngs={"dropout": key}`.
        """
        config = self.config
        block = nn.remat(Block) if config.remat else Block
        embed = nn.Embed(config.vocabulary, config.dim, name="embed")
        x = embed(tokens)
        # Not nn.scan: a step of decoding would copy each layer's weights from the stacked array.
        for i in range(config.layers):
            x = block(config, deterministic, name=f"layer_{i}")(x, seq_lengths)
        if last_only:
            last = x.shape[1] - 1 if seq_lengths is None else seq_lengths - 1
            x = jnp.take_along_axis(x, jnp.broadcast_to(last, x.shape[:1])[:, None, None], axis=1)
        x = nn.RMSNorm(epsilon=config.norm_eps, name="norm")(x)
        if config.tied_embeddings:
            return embed.attend(x)
        return nn.Dense(config.vocabulary, use_bias=False, name="lm_head")(x)


def next_token(logits: Float[Array, "B vocabulary"], temperature: float, key: PRNGKeyArray) -> Int[Array, " B"]:
    """The most probable token at temperature 0, else one drawn from softmax(logits / temperature)."""
    return jax.random.categorical(key, logits / temperature) if temperature else jnp.argmax(logits, axis=-1)


def cache_bytes_per_token(config: LlamaConfig) -> int:
    """The bytes of one token of one row in the caches of all layers, with the scales of keys and values in 8 bits."""
    return config.layers * mqa_jax.cache_bytes(config.attention().init_cache(1, max_length=1))
