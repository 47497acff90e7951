"""The model of `llama.py` in `flax.nnx`: its parameters have the same names and shapes, see `mqa_jax.nnx.to_linen`."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from llama import LlamaConfig

from mqa_jax import nnx as mqa_nnx


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.gate_up = nnx.Linear(config.dim, 2 * config.hidden, use_bias=config.mlp_bias, rngs=rngs)
        self.down = nnx.Linear(config.hidden, config.dim, use_bias=config.mlp_bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(nnx.silu(gate) * up)


class Block(nnx.Module):
    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        norm = lambda: nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = mqa_nnx.GroupedQueryAttention(**config.attention_settings(), keep_rngs=False, rngs=rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(self, x: Float[Array, "B T D"], **options: Any) -> Float[Array, "B T D"]:
        attended, _, _ = self.attention(self.attention_norm(x), **options)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Tokens in, logits out. In a view with a cache (`nnx.view(model, decode=True, ...)`) tokens continue it."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocabulary, config.dim, rngs=rngs)
        self.layer = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.dim, epsilon=config.norm_eps, rngs=rngs)
        head = None if config.tied_embeddings else nnx.Linear(config.dim, config.vocabulary, use_bias=False, rngs=rngs)
        self.lm_head = nnx.data(head)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        seq_lengths: Int[Array, " B"] | None = None,
        *,
        last_only: bool = False,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T vocabulary"]:
        """`last_only`: logits of the last token of each row alone, `[B, 1, vocabulary]`.

        `deterministic`: no dropout; without it `rngs` has its random keys.
        """
        x = self.embed(tokens)
        for block in self.layer:
            key = None if rngs is None else rngs.dropout()
            run = lambda block, x, key: block(x, seq_lengths=seq_lengths, deterministic=deterministic, rngs=key)
            x = (nnx.remat(run) if self.config.remat else run)(block, x, key)
        if last_only:
            last = x.shape[1] - 1 if seq_lengths is None else seq_lengths - 1
            x = jnp.take_along_axis(x, jnp.broadcast_to(last, x.shape[:1])[:, None, None], axis=1)
        x = self.norm(x)
        return self.embed.attend(x) if self.lm_head is None else self.lm_head(x)
