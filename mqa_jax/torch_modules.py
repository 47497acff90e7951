"""A live PyTorch attention layer as one of our modules with its weights, and the weights back into one.

Classes of transformers tell their settings by their config, `torch.nn.MultiheadAttention` by its attributes. Of any
other class the weights say how many features and biases there are, and the caller says the rest.
"""

import copy
from collections.abc import Mapping
from typing import Any

from mqa_jax import hf_attention, torch_arrays, torch_layouts, torch_state_dict
from mqa_jax.modules import GroupedQueryAttention


def from_torch(
    module: Any, *, heads: int | None = None, kv_heads: int | None = None, layout: str | None = None, **settings: Any
) -> tuple[GroupedQueryAttention, dict[str, Any]]:
    """Our module and its variables, which compute what a torch layer does.

    Args:
      module: a `torch.nn.MultiheadAttention`, an attention layer of a Hugging Face model
        (`mqa_jax.hf_attention.FAMILIES`), or any other whose state dict is in `mqa_jax.torch_layouts`.
      heads, kv_heads: of the other classes; kv_heads is as heads by default.
      layout: how the weights lie, if their names do not tell.
      **settings: of `GroupedQueryAttention`, where the class does not tell them: causal, rope, clip_qkv, ...

    Returns:
      The module, and `{"params": ...}` in the dtype of the weights.
    """
    told = _told_by_class(module)
    heads, kv_heads = heads or told.pop("heads", None), kv_heads or told.pop("kv_heads", None)
    if heads is None:
        raise ValueError(
            f"{type(module).__name__} does not tell its number of heads: heads={heads}. Pass heads=, and kv_heads= "
            "where keys and values have fewer."
        )
    state = {name: x for name, x in module.state_dict().items() if "LayerNorm" not in name}  # BERT's, after attention
    params = torch_state_dict.from_state_dict(state, heads=heads, kv_heads=kv_heads, layout=layout)
    told = {**settings_of(params), **told, **settings}
    return GroupedQueryAttention(heads=heads, kv_heads=kv_heads, **told), {"params": params}


def to_torch(module: GroupedQueryAttention, variables: Mapping[str, Any], *, like: Any) -> Any:
    """A copy of the torch layer `like` that has our weights, each in the dtype that it has there.

    Raises:
      ValueError: the layer says that it has other heads, or the parameters do not fit it.
    """
    theirs, told = like.state_dict(), _told_by_class(like)
    ours = dict(heads=module.heads, kv_heads=module.kv_heads or module.heads)
    other = {name: told[name] for name, count in ours.items() if told.get(name) not in (None, count)}
    if other:
        raise ValueError(f"{type(like).__name__} has other heads than our module: its {other}, ours {ours}.")
    layout, _ = torch_layouts.find(None, theirs, **ours)
    written = torch_state_dict.to_state_dict(variables["params"], layout=layout)
    wrong = {
        name: (x.shape, tuple(theirs[name].shape) if name in theirs else None)
        for name, x in written.items()
        if name not in theirs or x.shape != tuple(theirs[name].shape)
    }
    if wrong:
        raise ValueError(f"These parameters do not fit {type(like).__name__}; ours and its shapes: {wrong}.")
    result = copy.deepcopy(like)
    state = result.state_dict()
    for name, x in written.items():
        state[name].copy_(torch_arrays.to_tensor(x))
    return result


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """What parameters say of the module that they belong to."""
    dim, _, head_dim = params["query"]["kernel"].shape
    settings: dict[str, Any] = dict(dim=dim, head_dim=head_dim, use_bias="bias" in params["query"])
    settings["output_projection"] = "out" in params
    if "out" in params:
        settings |= dict(out_features=params["out"]["kernel"].shape[-1], use_out_bias="bias" in params["out"])
    if "q_ln" in params:
        whole = params["q_ln"]["scale"].shape[0] != head_dim
        settings |= dict(qk_ln=whole, qk_gn=not whole)
        settings["norm_type"] = "layernorm" if "bias" in params["q_ln"] else "rmsnorm"
    settings["add_bias_kv"] = "bias_k" in params
    return settings


# What mqa, zeta, llm-foundry, FlashMHA and transformers' MPT call the settings that they keep.
ATTRIBUTES = {
    "heads": ("n_heads", "heads", "num_heads"),
    "kv_heads": ("kv_n_heads",),
    "causal": ("causal",),
    "clip_qkv": ("clip_qkv",),
    "softmax_scale": ("softmax_scale",),
    "attn_pdrop": ("attn_dropout_p", "attn_pdrop"),
    "local_window_size": ("sliding_window_size",),
    "logits_soft_cap": ("attn_logit_softcapping",),
}
TOLD_BY_CONFIG = (
    "heads",
    "kv_heads",
    "rope",
    "alibi",
    "causal",
    "clip_qkv",
    "softmax_scale",
    "attn_pdrop",
    "local_window_size",
)


def _told_by_class(module: Any) -> dict[str, Any]:
    """Settings that a live layer of a known class tells."""
    kind = type(module).__name__
    if kind == "MultiheadAttention" and hasattr(module, "in_proj_bias"):  # torch's
        return dict(heads=module.num_heads, causal=False, attn_pdrop=module.dropout, add_zero_attn=module.add_zero_attn)
    config = getattr(getattr(module, "self", module), "config", None)  # BERT's is one module further in
    if config is not None:
        layer, _ = hf_attention.attention_of(config.to_dict(), getattr(module, "layer_idx", None) or 0)
        return {name: getattr(layer, name) for name in TOLD_BY_CONFIG}
    told = {
        ours: getattr(module, theirs)
        for ours, names in ATTRIBUTES.items()
        for theirs in names
        if isinstance(getattr(module, theirs, None), int | float)
    }
    if told.get("local_window_size") == -1:  # llm-foundry's word for none
        told["local_window_size"] = None
    if kind == "MultiQueryAttention":
        told["kv_heads"] = 1
    if kind == "MptAttention":
        told["alibi"] = True
    return torch_layouts.knotgrass_settings(module.state_dict()) | told
