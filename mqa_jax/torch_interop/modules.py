"""Converts a live PyTorch attention layer to a Flax module with its weights, and the weights back to a torch layer.

Classes of transformers have their settings in their config, `torch.nn.MultiheadAttention` in its attributes. For all
other classes the numbers of features and the biases follow from the weights, and the caller passes the other settings.
"""

import copy
from collections.abc import Mapping
from typing import Any

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.positions import TemperatureTuning
from mqa_jax.torch_interop import arrays, layouts, state_dict, wrappers
from mqa_jax.torch_interop.hugging_face import attention as hf_attention


def from_torch(
    module: Any, *, heads: int | None = None, kv_heads: int | None = None, layout: str | None = None, **settings: Any
) -> tuple[GroupedQueryAttention, dict[str, Any]]:
    """A Flax module and its variables that compute the same as a torch layer in evaluation mode.

    Also in training mode, except for dropout of the layer's output (GPTBigCode's `resid_pdrop`), which the caller must
    add. Two weights that are one tensor in torch become two.

    Args:
      module: a `torch.nn.MultiheadAttention`, an attention layer of a Hugging Face model
        (`hugging_face.attention.FAMILIES`), or any other whose state dict is in `torch_interop.layouts`.
      heads, kv_heads: for the other classes; kv_heads is equal to heads by default.
      layout: a name of `torch_interop.layouts`, if the names of the weights do not identify it.
      **settings: of `GroupedQueryAttention`, where the class does not declare them: causal, rope, clip_qkv, ...

    Returns:
      The module, and `{"params": ...}` in the dtype of the weights.

    Raises:
      NotImplementedError: the layer has settings that the Flax module does not have, or is an unknown class of
        transformers; or its weights are quantised, or are computed by a wrapper (LoRA, weight norm).
      ValueError: a setting of the layer is missing; or its weights are not in memory, or not in a known layout.
    """
    wrappers.check(module)
    declared = _declared_by_class(module)
    given = {name: x for name, x in dict(heads=heads, kv_heads=kv_heads).items() if x is not None}
    wrong = {name: declared[name] for name, x in given.items() if declared.get(name, x) not in (None, x)}
    if wrong:
        raise ValueError(f"{type(module).__name__} has other numbers of heads: its {wrong}, given {given}.")
    counts = {name: given.get(name, declared.pop(name, None)) for name in ("heads", "kv_heads")}
    declared = {name: x for name, x in declared.items() if name not in counts}
    if counts["heads"] is None:
        raise ValueError(
            f"{type(module).__name__} does not declare its number of heads: heads=None. Pass heads=, and kv_heads= "
            "if keys and values have fewer heads."
        )
    rotary = wrappers.rotary(module)
    if rotary and "rope" not in {*declared, *settings}:
        raise ValueError(
            f"{type(module).__name__} has rotary positions in {rotary}, but does not declare them: pass rope=."
        )
    params = state_dict.from_state_dict(module.state_dict(), layout=layout_of(module, layout), **counts)
    return GroupedQueryAttention(**counts, **{**settings_of(params), **declared, **settings}), {"params": params}


def to_torch(
    module: GroupedQueryAttention, variables: Mapping[str, Any], *, like: Any, layout: str | None = None
) -> Any:
    """A copy of the torch layer `like` with the weights of a Flax module, each in the dtype that it has in `like`.

    Args:
      layout: a name of `torch_interop.layouts`, if the names of the weights do not identify it.

    Raises:
      ValueError: the layer declares other numbers of heads, or the parameters do not fit it.
    """
    wrappers.check(like)
    torch_state, declared = like.state_dict(), _declared_by_class(like)
    counts = dict(heads=module.heads, kv_heads=module.kv_heads or module.heads)
    other = {name: declared[name] for name, count in counts.items() if declared.get(name) not in (None, count)}
    if other:
        raise ValueError(f"{type(like).__name__} has other heads than the Flax module: {other} instead of {counts}.")
    name, _ = layouts.find(layout_of(like, layout), torch_state, **counts)
    written = state_dict.to_state_dict(variables["params"], layout=name)
    wrong = {
        name: (x.shape, tuple(torch_state[name].shape) if name in torch_state else None)
        for name, x in written.items()
        if name not in torch_state or x.shape != tuple(torch_state[name].shape)
    }
    if wrong:
        raise ValueError(f"These parameters do not fit {type(like).__name__}; Flax and torch shapes: {wrong}.")
    unwritten = [name for name, x in torch_state.items() if name not in written and not layouts.is_ignored(name, x)]
    if unwritten:
        raise ValueError(f"These parameters of {type(like).__name__} have no Flax counterpart: {unwritten}.")
    result = copy.deepcopy(like)
    state = result.state_dict()
    for name, x in written.items():
        state[name].copy_(arrays.to_tensor(x))
    lost = [name for name, x in written.items() if not bool((state[name] == arrays.to_tensor(x).to(state[name])).all())]
    if lost:
        raise ValueError(f"{type(like).__name__} has one tensor for several Flax parameters that differ: {lost}.")
    return result


def layout_of(module: Any, layout: str | None = None) -> str | None:
    """The layout of a live layer's weights: `layout` if given, else that of its class, or None."""
    family = _family_of(module)
    return family.layout if family is not None and layout is None else layout


def settings_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a module that follow from its parameters."""
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


# The attribute names of settings in mqa, zeta, llm-foundry, FlashMHA, nanoGPT and transformers' MPT.
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
CONFIG_SETTINGS = (
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


def _declared_by_class(module: Any) -> dict[str, Any]:
    """The settings that a live layer declares by its class, config, attributes or names of weights."""
    kind = type(module).__name__
    if kind == "MultiheadAttention" and type(module).__module__.startswith("torch.nn."):
        return dict(heads=module.num_heads, causal=False, attn_pdrop=module.dropout, add_zero_attn=module.add_zero_attn)
    config = config_of(module)
    if config is not None:
        return _declared_by_config(module, config)
    declared = {
        setting: getattr(module, attribute)
        for setting, attributes in ATTRIBUTES.items()
        for attribute in attributes
        if isinstance(getattr(module, attribute, None), int | float)
    }
    if declared.get("local_window_size") == -1:  # no window, in llm-foundry
        declared["local_window_size"] = None
    if isinstance(getattr(module, "attn_temperature_tuning", None), Mapping):  # llm-foundry's
        declared["attn_temperature_tuning"] = TemperatureTuning(**module.attn_temperature_tuning)
    if kind == "MultiQueryAttention":
        declared["kv_heads"] = 1
    if kind == "MptAttention":
        declared["alibi"] = True
    return layouts.knotgrass_settings(module.state_dict()) | declared


def _declared_by_config(module: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    kind, number = type(module).__name__, getattr(module, "layer_idx", None) or 0
    cross = getattr(module, "is_cross_attention", False)
    try:
        layer, family = hf_attention.attention_of(config, number)
    except NotImplementedError as error:
        raise NotImplementedError(f"{error} {_remedy(module)}") from error
    if kind not in family.classes:
        raise NotImplementedError(
            f"{kind} is not the attention of {config['model_type']}, {family.classes}. {_remedy(module)}"
        )
    if cross and kind != "BertAttention":
        raise NotImplementedError(
            f"Cross-attention of {kind} has a projection of its own: is_cross_attention=True. {_remedy(module)}"
        )
    declared = {name: getattr(layer, name) for name in CONFIG_SETTINGS}
    return declared | dict(causal=False) if cross else declared


def config_of(module: Any) -> Mapping[str, Any] | None:
    """The config of a layer of transformers, else None; other libraries may have a `config` of another kind.

    Without `quantization_config`, which describes the file (transformers converts GGUF files to floats): the dtypes of
    the live tensors count.
    """
    config: Any = getattr(getattr(module, "self", module), "config", None)  # BERT has it in a submodule
    if not hasattr(config, "to_dict") or not hasattr(config, "model_type"):
        return None
    return config.to_dict() | {"quantization_config": None}


def _family_of(module: Any) -> hf_attention.Family | None:
    kind = type(module).__name__
    return next((family for family in hf_attention.FAMILIES.values() if kind in family.classes), None)


def _remedy(module: Any) -> str:
    return (
        "Instead, make GroupedQueryAttention(...) with the settings of the layer, and convert its weights with "
        "torch_interop.from_state_dict(tensors, heads=..., kv_heads=..., layout=...), with a layout of "
        f"{list(layouts.LAYOUTS)} and tensors under its names (mqa_jax/torch_interop/layouts.py). The layer has "
        f"{layouts.shapes(module.state_dict())}."
    )
