"""A live PyTorch attention layer as one of our modules with its weights, and the weights back into one.

Classes of transformers tell their settings by their config, `torch.nn.MultiheadAttention` by its attributes. Of any
other class the weights say how many features and biases there are, and the caller says the rest.
"""

import copy
from collections.abc import Mapping
from typing import Any

from mqa_jax import hf_attention, torch_arrays, torch_layouts, torch_state_dict, torch_wrappers
from mqa_jax.modules import GroupedQueryAttention
from mqa_jax.positions import TemperatureTuning


def from_torch(
    module: Any, *, heads: int | None = None, kv_heads: int | None = None, layout: str | None = None, **settings: Any
) -> tuple[GroupedQueryAttention, dict[str, Any]]:
    """Our module and its variables, which compute what a torch layer does in evaluation mode.

    In training mode too, but for dropout of the layer's output (GPTBigCode's `resid_pdrop`), which is left to the
    caller. Two weights that are one tensor in torch become two.

    Args:
      module: a `torch.nn.MultiheadAttention`, an attention layer of a Hugging Face model
        (`mqa_jax.hf_attention.FAMILIES`), or any other whose state dict is in `mqa_jax.torch_layouts`.
      heads, kv_heads: of the other classes; kv_heads is as heads by default.
      layout: how the weights lie, if their names do not tell.
      **settings: of `GroupedQueryAttention`, where the class does not tell them: causal, rope, clip_qkv, ...

    Returns:
      The module, and `{"params": ...}` in the dtype of the weights.

    Raises:
      NotImplementedError: the layer has settings that our module has not, or is a class of transformers that is not
        known; or its weights are quantised, or are computed by what is wrapped around them (LoRA, weight norm).
      ValueError: something about the layer is not told; or its weights are in no memory, or in no known layout.
    """
    torch_wrappers.check(module)
    told = _told_by_class(module)
    given = {name: x for name, x in dict(heads=heads, kv_heads=kv_heads).items() if x is not None}
    wrong = {name: told[name] for name, x in given.items() if told.get(name, x) not in (None, x)}
    if wrong:
        raise ValueError(f"{type(module).__name__} has other numbers of heads: its {wrong}, given {given}.")
    counts = {name: given.get(name, told.pop(name, None)) for name in ("heads", "kv_heads")}
    told = {name: x for name, x in told.items() if name not in counts}
    if counts["heads"] is None:
        raise ValueError(
            f"{type(module).__name__} does not tell its number of heads: heads=None. Pass heads=, and kv_heads= "
            "where keys and values have fewer."
        )
    rotary = torch_wrappers.rotary(module)
    if rotary and "rope" not in {*told, *settings}:
        raise ValueError(
            f"{type(module).__name__} has rotary positions in {rotary}, and does not tell which: pass rope=."
        )
    params = torch_state_dict.from_state_dict(module.state_dict(), layout=layout_of(module, layout), **counts)
    return GroupedQueryAttention(**counts, **{**settings_of(params), **told, **settings}), {"params": params}


def to_torch(
    module: GroupedQueryAttention, variables: Mapping[str, Any], *, like: Any, layout: str | None = None
) -> Any:
    """A copy of the torch layer `like` that has our weights, each in the dtype that it has there.

    Args:
      layout: how its weights lie, if their names do not tell.

    Raises:
      ValueError: the layer says that it has other heads, or the parameters do not fit it.
    """
    torch_wrappers.check(like)
    theirs, told = like.state_dict(), _told_by_class(like)
    ours = dict(heads=module.heads, kv_heads=module.kv_heads or module.heads)
    other = {name: told[name] for name, count in ours.items() if told.get(name) not in (None, count)}
    if other:
        raise ValueError(f"{type(like).__name__} has other heads than our module: its {other}, ours {ours}.")
    name, _ = torch_layouts.find(layout_of(like, layout), theirs, **ours)
    written = torch_state_dict.to_state_dict(variables["params"], layout=name)
    wrong = {
        name: (x.shape, tuple(theirs[name].shape) if name in theirs else None)
        for name, x in written.items()
        if name not in theirs or x.shape != tuple(theirs[name].shape)
    }
    if wrong:
        raise ValueError(f"These parameters do not fit {type(like).__name__}; ours and its shapes: {wrong}.")
    unwritten = [name for name, x in theirs.items() if name not in written and not torch_layouts.is_ignored(name, x)]
    if unwritten:
        raise ValueError(f"These parameters of {type(like).__name__} have no counterpart among ours: {unwritten}.")
    result = copy.deepcopy(like)
    state = result.state_dict()
    for name, x in written.items():
        state[name].copy_(torch_arrays.to_tensor(x))
    lost = [
        name
        for name, x in written.items()
        if not bool((state[name] == torch_arrays.to_tensor(x).to(state[name])).all())
    ]
    if lost:
        raise ValueError(f"{type(like).__name__} has one tensor where ours are several and differ: {lost}.")
    return result


def layout_of(module: Any, layout: str | None = None) -> str | None:
    """How the weights of a live layer lie: `layout` if given, or what its class tells."""
    family = _family_of(module)
    return family.layout if family is not None and layout is None else layout


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


# What mqa, zeta, llm-foundry, FlashMHA, nanoGPT and transformers' MPT call the settings that they keep.
ATTRIBUTES = {
    "heads": ("n_heads", "heads", "num_heads", "n_head"),
    "kv_heads": ("kv_n_heads", "num_kv_heads", "n_kv_heads"),
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
    if kind == "MultiheadAttention" and type(module).__module__.startswith("torch.nn."):
        return dict(heads=module.num_heads, causal=False, attn_pdrop=module.dropout, add_zero_attn=module.add_zero_attn)
    config = config_of(module)
    if config is not None:
        return _told_by_config(module, config)
    told = {
        ours: getattr(module, theirs)
        for ours, names in ATTRIBUTES.items()
        for theirs in names
        if isinstance(getattr(module, theirs, None), int | float)
    }
    if told.get("local_window_size") == -1:  # llm-foundry's word for none
        told["local_window_size"] = None
    if isinstance(getattr(module, "attn_temperature_tuning", None), Mapping):  # llm-foundry's
        told["attn_temperature_tuning"] = TemperatureTuning(**module.attn_temperature_tuning)
    if kind == "MultiQueryAttention":
        told["kv_heads"] = 1
    if kind == "MptAttention":
        told["alibi"] = True
    return torch_layouts.knotgrass_settings(module.state_dict()) | told


def _told_by_config(module: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    kind, number = type(module).__name__, getattr(module, "layer_idx", None) or 0
    cross = getattr(module, "is_cross_attention", False)
    try:
        layer, family = hf_attention.attention_of(config, number)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error} {_way_out(module)}") from error
    if kind not in family.classes:
        raise NotImplementedError(
            f"{kind} is not the attention of {config['model_type']}, {family.classes}. {_way_out(module)}"
        )
    if cross and kind != "BertAttention":
        raise NotImplementedError(
            f"Cross-attention of {kind} has a projection of its own: is_cross_attention=True. {_way_out(module)}"
        )
    told = {name: getattr(layer, name) for name in TOLD_BY_CONFIG}
    return told | dict(causal=False) if cross else told


def config_of(module: Any) -> Mapping[str, Any] | None:
    """Of transformers' classes; others may have a `config` of another kind.

    Without `quantization_config`, which says what a file had (of GGUF files transformers makes plain floats): the
    tensors of a live layer say what they are.
    """
    config: Any = getattr(getattr(module, "self", module), "config", None)  # BERT's is one module further in
    if not hasattr(config, "to_dict") or not hasattr(config, "model_type"):
        return None
    return config.to_dict() | {"quantization_config": None}


def _family_of(module: Any) -> hf_attention.Family | None:
    kind = type(module).__name__
    return next((family for family in hf_attention.FAMILIES.values() if kind in family.classes), None)


def _way_out(module: Any) -> str:
    return (
        "A way that remains: GroupedQueryAttention(...) with the settings that the layer has, and its weights by "
        "torch_interop.from_state_dict(tensors, heads=..., kv_heads=..., layout=...), with a layout of "
        f"{list(torch_layouts.LAYOUTS)} and tensors under its names (mqa_jax/torch_layouts.py). The layer has "
        f"{torch_layouts.shapes(module.state_dict())}."
    )
