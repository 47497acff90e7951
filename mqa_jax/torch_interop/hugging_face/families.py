"""The families of attention layers: one entry for each `model_type`, as transformers 5 reads its `config.json`.

The defaults of missing fields are those of transformers, which differ from family to family. A setting that
transformers would silently ignore is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mqa_jax.torch_interop.hugging_face.config import Fields
from mqa_jax.torch_interop.hugging_face.rope import rope_of

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """The attention layers of one `model_type`.

    Attributes:
      settings: of `GroupedQueryAttention` for a layer, from the config and the layer's number.
      prefix: of a layer's tensors, `{}` being its number.
      layout: of these tensors (`mqa_jax.torch_interop.layouts`).
      classes: names of transformers' attention classes.
      layers: the field with the number of layers.
      aliases: other names of fields.
      harmless: fields that do not concern the attention layer although their names match `CONCERNS_ATTENTION`.
      neutral: the only supported values of fields that are not read.
    """

    settings: Callable[[Config, int], dict[str, Any]]
    prefix: str
    layout: str
    classes: tuple[str, ...]
    layers: str = "num_hidden_layers"
    aliases: Mapping[str, str] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    neutral: Mapping[str, Any] = field(default_factory=dict)


def _rotary(config: Config, kv_heads: int | None = None) -> dict[str, Any]:
    """The common settings of Llama, Mistral and Qwen2. `kv_heads`: the default, None for the number of query heads."""
    heads = config["num_attention_heads"]
    return dict(
        dim=config["hidden_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads", kv_heads) or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope=rope_of(config),
        attn_pdrop=config.get("attention_dropout") or 0.0,
    )


def _llama(config: Config, layer: int) -> dict[str, Any]:
    _check_kinds(config, layer, slides=False)
    return {**_rotary(config), "use_bias": config.get("attention_bias", False)}


def _mistral(config: Config, layer: int) -> dict[str, Any]:
    size = config.get("sliding_window", 4096)
    _check_kinds(config, layer, slides=size is not None)
    if config.get("use_sliding_window", size is not None) != (size is not None):
        raise NotImplementedError(
            "Mistral has a window wherever sliding_window is not null: "
            f"sliding_window={size}, use_sliding_window={config['use_sliding_window']}."
        )
    return {**_rotary(config, kv_heads=8), "local_window_size": _window(size)}


def _qwen2(config: Config, layer: int) -> dict[str, Any]:
    size, used = config.get("sliding_window", 4096), config.get("use_sliding_window", False)
    kinds, first = config.get("layer_types"), config.get("max_window_layers", 28)
    slides = used and size is not None and layer >= first  # the default of `layer_types` in transformers
    if kinds is not None:
        slides = _kind(kinds, layer) == "sliding_attention"
    if slides and not (used and size):
        raise NotImplementedError(
            f"This layer has a window without a size: layer_types[{layer}]='sliding_attention', sliding_window={size}, "
            f"use_sliding_window={used}."
        )
    window = _window(size if slides else None)
    return {**_rotary(config, kv_heads=32), "use_bias": True, "use_out_bias": False, "local_window_size": window}


def _kind(kinds: Any, layer: int) -> str:
    if layer >= len(kinds) or kinds[layer] not in ("full_attention", "sliding_attention"):
        raise NotImplementedError(
            f"A layer is of 'full_attention' or 'sliding_attention': layer={layer}, layer_types={kinds}."
        )
    return kinds[layer]


def _check_kinds(config: Config, layer: int, slides: bool) -> None:
    """Refuses `layer_types` that Llama and Mistral of transformers would ignore."""
    kinds = config.get("layer_types")
    if kinds is not None and (_kind(kinds, layer) == "sliding_attention") != slides:
        raise NotImplementedError(
            f"transformers ignores layer_types of model_type={config.get('model_type')!r}: "
            f"layer_types[{layer}]={kinds[layer]!r}, sliding_window={config.get('sliding_window')}."
        )


def _window(size: int | None) -> tuple[int, int] | None:
    """`local_window_size`; the window of transformers includes the query itself."""
    if size is not None and size < 1:
        raise ValueError(f"A window counts the query itself, so it has at least one key: sliding_window={size}.")
    return None if size is None else (size - 1, 0)


def _gpt_bigcode(config: Config, layer: int) -> dict[str, Any]:
    heads = config["n_head"]
    kv_heads = 1 if config.get("multi_query", True) else heads
    if config.get("num_key_value_heads", kv_heads) != kv_heads:
        raise NotImplementedError(
            f"GPTBigCode has 1 or n_head={heads} key/value heads, by multi_query={config.get('multi_query', True)}: "
            f"num_key_value_heads={config['num_key_value_heads']}."
        )
    return dict(
        dim=config["n_embd"],
        heads=heads,
        kv_heads=kv_heads,
        softmax_scale=None if config.get("scale_attn_weights", True) else 1.0,
        use_bias=True,
        attn_pdrop=config.get("attn_pdrop", 0.1),
    )


def _falcon(config: Config, layer: int) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    grouped, one = config.get("new_decoder_architecture", False), config.get("multi_query", True)
    groups = config.get("num_kv_heads") or heads
    if not grouped and not one and groups != heads:
        raise NotImplementedError(
            f"Falcon has groups of heads with new_decoder_architecture=True only: num_kv_heads={groups}, "
            f"num_attention_heads={heads}, multi_query=False."
        )
    alibi, rope = config.get("alibi", False), rope_of(config)
    dropout = config.get("attention_dropout") or 0.0
    return dict(
        dim=config["hidden_size"],
        heads=heads,
        kv_heads=groups if grouped or not one else 1,
        rope=None if alibi else rope,
        alibi="falcon" if alibi else False,
        use_bias=config.get("bias", False),
        attn_pdrop=dropout if alibi else 0.0,  # with RoPE, transformers drops nothing
    )


def _mpt(config: Config, layer: int) -> dict[str, Any]:
    """Always ALiBi with alibi_bias_max=8: transformers ignores other settings of the config, which are errors here."""
    attention = Fields(config.get("attn_config") or {})
    settings = dict(
        dim=config["d_model"],
        heads=config["n_heads"],
        alibi=True,
        clip_qkv=attention.get("clip_qkv"),
        softmax_scale=attention.get("softmax_scale"),
        attn_pdrop=attention.get("attn_pdrop") or 0.0,
    )
    ignored = attention.unread(harmless=_MPT_HARMLESS, neutral=_MPT_NEUTRAL)
    if ignored:
        raise NotImplementedError(
            f"transformers ignores these settings of MPT: attn_config={ignored}. Set up GroupedQueryAttention "
            "yourself, and convert the weights with from_state_dict(..., layout='fused')."
        )
    return settings


_MPT_HARMLESS = frozenset({"attn_impl", "rope_dail_config", "rope_hf_config", "rope_impl", "rope_theta"})
_MPT_NEUTRAL = {
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "fused_qkv": True,
    "prefix_lm": False,
    "qk_gn": False,
    "qk_ln": False,
    "rope": False,
    "sliding_window_size": -1,
}


def _bert(config: Config, layer: int) -> dict[str, Any]:
    return dict(
        dim=config["hidden_size"],
        heads=config["num_attention_heads"],
        causal=config.get("is_decoder", False),
        use_bias=True,
        attn_pdrop=config.get("attention_probs_dropout_prob", 0.1),
    )


def _self_attn(settings: Callable[[Config, int], dict[str, Any]], name: str) -> Family:
    return Family(settings, "model.layers.{}.self_attn.", "llama", (f"{name}Attention",))


FAMILIES: dict[str, Family] = {
    "llama": _self_attn(_llama, "Llama"),
    "mistral": _self_attn(_mistral, "Mistral"),
    "qwen2": _self_attn(_qwen2, "Qwen2"),
    "gpt_bigcode": Family(
        _gpt_bigcode,
        "transformer.h.{}.attn.",
        "gpt_bigcode",
        ("GPTBigCodeAttention",),
        layers="n_layer",
        aliases={"hidden_size": "n_embd", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
        harmless=frozenset({"add_cross_attention"}),  # it adds other layers
    ),
    "falcon": Family(
        _falcon,
        "transformer.h.{}.self_attention.",
        "falcon",
        ("FalconAttention", "FalconFlashAttention2"),
        aliases={"n_embed": "hidden_size"},
        harmless=frozenset({"num_ln_in_parallel_attn", "parallel_attn"}),
    ),
    "mpt": Family(
        _mpt,
        "transformer.blocks.{}.attn.",
        "fused",
        ("MptAttention",),
        layers="n_layers",
        aliases={"hidden_size": "d_model", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
        neutral={"no_bias": True},
    ),
    "bert": Family(
        _bert,
        "encoder.layer.{}.attention.",
        "bert",
        ("BertAttention",),
        harmless=frozenset({"add_cross_attention", "pooler_num_attention_heads", "pooler_size_per_head"}),
        neutral={"is_causal": None, "position_embedding_type": "absolute"},
    ),
}
