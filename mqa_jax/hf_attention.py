"""What a Hugging Face `config.json` says of its attention layers: our module's settings, and where the weights are.

One line for each `model_type`, as transformers 5 reads it. What transformers would silently ignore is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mqa_jax.modules import GroupedQueryAttention
from mqa_jax.positions import LinearScaling, Llama3Scaling, Rope

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """Attributes:
    settings: of `GroupedQueryAttention` for a layer, from the config and the layer's number.
    prefix: of a layer's tensors, `{}` being its number.
    layout: how they are laid out (`mqa_jax.torch_layouts`).
    """

    settings: Callable[[Config, int], dict[str, Any]]
    prefix: str
    layout: str


def attention_of(config: Config, layer: int = 0) -> tuple[GroupedQueryAttention, Family]:
    """Our module for a layer of a model, and its family.

    Args:
      config: what is in `config.json`, or `transformers.PretrainedConfig.to_dict()`.
      layer: its number; some models have windows in some of their layers alone.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise NotImplementedError(f"No known attention layer: model_type={model_type!r}, known are {sorted(FAMILIES)}.")
    family = FAMILIES[model_type]
    return GroupedQueryAttention(**{"use_bias": False, **family.settings(config, layer)}), family


def rope_of(config: Config) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling` (before)."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta") or 10_000.0,
        **(config.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(theta=rope["rope_theta"])
    if kind == "linear":
        return Rope(theta=rope["rope_theta"], scaling=LinearScaling(factor=rope["factor"]))
    if kind == "llama3":
        names = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        return Rope(theta=rope["rope_theta"], scaling=Llama3Scaling(**{name: rope[name] for name in names}))
    raise NotImplementedError(f"RoPE scaling is 'default', 'linear' or 'llama3': rope_type={kind!r}.")


# -- families ---------------------------------------------------------------------------------------------------------


def _llama(config: Config, layer: int) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    return dict(
        dim=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope=rope_of(config),
        use_bias=config.get("attention_bias", False),
        attn_pdrop=config.get("attention_dropout") or 0.0,
    )


def _mistral(config: Config, layer: int) -> dict[str, Any]:
    return {**_llama(config, layer), "use_bias": False, "local_window_size": _window(config.get("sliding_window"))}


def _qwen2(config: Config, layer: int) -> dict[str, Any]:
    kinds = config.get("layer_types")
    if kinds is None:  # as transformers fills them in
        first = config.get("max_window_layers", 28)
        slides = bool(config.get("use_sliding_window", False)) and layer >= first
    else:
        slides = kinds[layer] == "sliding_attention"
    window = _window(config.get("sliding_window")) if slides else None
    return {**_llama(config, layer), "use_bias": True, "use_out_bias": False, "local_window_size": window}


def _window(size: int | None) -> tuple[int, int] | None:
    """Theirs counts the query itself."""
    return None if size is None else (size - 1, 0)


def _gpt_bigcode(config: Config, layer: int) -> dict[str, Any]:
    return dict(
        dim=config["n_embd"],
        heads=config["n_head"],
        kv_heads=1 if config.get("multi_query", True) else None,
        softmax_scale=None if config.get("scale_attn_weights", True) else 1.0,
        use_bias=True,
        attn_pdrop=config.get("attn_pdrop", 0.1),
    )


def _falcon(config: Config, layer: int) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    grouped = config.get("new_decoder_architecture", False)
    one = config.get("multi_query", True) and not grouped
    alibi = config.get("alibi", False)
    return dict(
        dim=config["hidden_size"],
        heads=heads,
        kv_heads=1 if one else (config.get("num_kv_heads") or heads) if grouped else heads,
        rope=None if alibi else rope_of(config),
        alibi="falcon" if alibi else False,
        use_bias=config.get("bias", False),
        attn_pdrop=config.get("attention_dropout") or 0.0,
    )


def _mpt(config: Config, layer: int) -> dict[str, Any]:
    """ALiBi always, with alibi_bias_max=8: transformers ignores what else the config may say."""
    attention = config.get("attn_config") or {}
    ignored = {
        "alibi": True,
        "alibi_bias_max": 8,
        "qk_ln": False,
        "attn_type": "multihead_attention",
        "prefix_lm": False,
    }
    wrong = {name: attention[name] for name, only in ignored.items() if attention.get(name, only) != only}
    if wrong:
        raise NotImplementedError(
            f"transformers ignores these settings of MPT: attn_config={wrong}. Set up GroupedQueryAttention yourself, "
            "and convert the weights with from_state_dict(..., layout='fused')."
        )
    return dict(
        dim=config["d_model"],
        heads=config["n_heads"],
        alibi=True,
        clip_qkv=attention.get("clip_qkv"),
        softmax_scale=attention.get("softmax_scale"),
        attn_pdrop=attention.get("attn_pdrop") or 0.0,
    )


def _bert(config: Config, layer: int) -> dict[str, Any]:
    return dict(
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        causal=False,
        use_bias=True,
        attn_pdrop=config.get("attention_probs_dropout_prob", 0.1),
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, "model.layers.{}.self_attn.", "llama"),
    "mistral": Family(_mistral, "model.layers.{}.self_attn.", "llama"),
    "qwen2": Family(_qwen2, "model.layers.{}.self_attn.", "llama"),
    "gpt_bigcode": Family(_gpt_bigcode, "transformer.h.{}.attn.", "gpt_bigcode"),
    "falcon": Family(_falcon, "transformer.h.{}.self_attention.", "falcon"),
    "mpt": Family(_mpt, "transformer.blocks.{}.attn.", "fused"),
    "bert": Family(_bert, "encoder.layer.{}.attention.", "bert"),
}
