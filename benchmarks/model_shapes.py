"""The attention of real models, as their `config.json` has it: the sizes that kernels are compiled and measured for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """One attention layer.

    Attributes:
      heads, kv_heads: of queries, and of keys and values; N and K of `mqa_jax.shapes`.
      head_dim: features of a query and a key, H.
      value_dim: features of a value, V, if not H.
      window: how many keys a query sees, its own included; None for all.
      alibi: whether scores fall with distance, with the slopes of `mqa_jax.alibi_slopes`.
      soft_cap: of the scores.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    window: int | None = None
    alibi: bool = False
    soft_cap: float | None = None


MODEL_SHAPES = (
    ModelShape("Llama-3-8B", heads=32, kv_heads=8, head_dim=128),
    ModelShape("Falcon-7B", heads=71, kv_heads=1, head_dim=64),
    ModelShape("StarCoder", heads=48, kv_heads=1, head_dim=128),
    ModelShape("Gemma-2B", heads=8, kv_heads=1, head_dim=256),
    ModelShape("SmolLM2-135M", heads=9, kv_heads=3, head_dim=64),
    ModelShape("MPT-7B", heads=32, kv_heads=32, head_dim=128, alibi=True),
    ModelShape("Mistral-7B", heads=32, kv_heads=8, head_dim=128, window=4096),
    ModelShape("Phi-2", heads=32, kv_heads=32, head_dim=80),
    ModelShape("Phi-3-mini", heads=32, kv_heads=32, head_dim=96),
    # Multi-head latent attention with its keys and values written out, as in training and for prompts.
    ModelShape("DeepSeek-V2-Lite", heads=16, kv_heads=16, head_dim=192, value_dim=128),
    # Every second layer; the others have a window of 4096 as well.
    ModelShape("Gemma-2-9B", heads=16, kv_heads=8, head_dim=256, soft_cap=50.0),
)
SHAPES = {shape.name: shape for shape in MODEL_SHAPES}
MULTI_QUERY = ModelShape("multi-query", heads=32, kv_heads=1, head_dim=128)


def shape_of(heads: int, kv_heads: int, head_dim: int) -> ModelShape:
    """Of no model in particular."""
    return ModelShape(f"{heads}/{kv_heads} heads of {head_dim}", heads, kv_heads, head_dim)
