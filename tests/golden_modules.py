"""Builds, for each reference vector, our counterpart of the upstream module that made it.

A vector is an npz file: `in/*` inputs, `w/*` weights under their torch names, `out/*` outputs, `ct/out` a cotangent,
`gin/*` and `gw/*` the gradients of sum(out * ct), `meta` the constructor and the calls as JSON. They were made by
running the original projects on a CPU with torch 2.13, in float32.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import mqa_jax
from mqa_jax import torch_interop

FOLDER = Path(__file__).parent / "goldens"
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    name: str
    meta: dict[str, Any]
    arrays: Arrays

    def group(self, prefix: str) -> Arrays:
        return {name.removeprefix(prefix): x for name, x in self.arrays.items() if name.startswith(prefix)}

    @property
    def source(self) -> str:
        target = self.meta["target"]
        return target.get("loader", target["kind"])

    @property
    def upstream_class(self) -> str:
        return self.meta["target"]["cls"]

    def arguments(self, inputs: Arrays) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of the upstream call, with arrays in place of their names."""
        call = self.meta["calls"][0]
        fill = lambda x: _fill(x, inputs)
        return [fill(x) for x in call["args"]], {name: fill(x) for name, x in call["kwargs"].items()}


def _fill(x: Any, inputs: Arrays) -> Any:
    if isinstance(x, dict) and "$in" in x:
        return inputs[x["$in"]]
    if isinstance(x, dict) and "$tuple" in x:
        return tuple(_fill(item, inputs) for item in x["$tuple"])
    return x


def load(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return Golden(name, json.loads(str(file["meta"])), arrays)


def _apply(module: Any, params: Any, *arguments: Any, **options: Any) -> Any:
    return module.apply({"params": params}, *arguments, **options)


def run(golden: Golden, weights: Arrays, inputs: Arrays) -> Arrays:
    """The outputs of our counterpart, under the names and in the layouts of the vector."""
    arguments, options = golden.arguments(inputs)
    return _RUNNERS[golden.source, golden.upstream_class](golden, weights, arguments, options)


# -- mqa, zeta, llm-foundry -------------------------------------------------------------------------------------------

_NORM_TYPES = {"layernornm": "layernorm"}  # upstream's spelling of the only one that runs unpatched
_CONSTRUCTOR_NAMES = {
    "n_heads": "heads",
    "kv_n_heads": "kv_heads",
    "attn_logit_softcapping": "logits_soft_cap",
    "sliding_window_size": "local_window_size",
    "attention_bias": "use_bias",
    "bias": "use_out_bias",
}
# Settings that only say which weights there are; the state dict says it too.
_IMPLIED = ("fused_qkv", "kv_dim", "reuse_kv_layer_idx", "reuse_kv_x_layer_idx")
_CALL_NAMES = {
    "attn_bias": "bias",
    "attention_mask": "mask",
    "is_causal": "causal",
    "key_value_states": "inputs_k",
    "x_prev": "inputs_k",
    "pos_id_within_seq": "positions",
}
_KV_HEADS = {"MultiQueryAttention": 1, "MultiHeadAttention": None, "MultiheadAttention": None}


def _upstream_module(golden: Golden, options: dict[str, Any]) -> mqa_jax.GroupedQueryAttention:
    settings = {_CONSTRUCTOR_NAMES.get(k, k): v for k, v in golden.meta["ctor"].items() if k not in _IMPLIED}
    settings["attn_impl"] = "torch"
    if "norm_type" in settings:
        settings["norm_type"] = _NORM_TYPES.get(settings["norm_type"], settings["norm_type"])
    if settings.get("local_window_size") == -1:
        settings["local_window_size"] = None
    if "head_dim" in settings:  # llm-foundry keeps the scale of the default head size
        settings["softmax_scale"] = (settings["d_model"] / settings["heads"]) ** -0.5
    if "attn_temperature_tuning" in settings:
        settings["attn_temperature_tuning"] = mqa_jax.TemperatureTuning(**settings["attn_temperature_tuning"])
    rope = options.pop("rotary_emb_w_meta_info", None)
    if rope is not None and not settings.pop("nope", False):
        settings["rope"] = mqa_jax.Rope(theta=rope["$rope_hf"]["theta"])
        options["positions"] = golden.arrays[f"in/{rope['$rope_hf']['position_ids']}"]
    settings.pop("nope", None)
    if "kv_heads" not in settings:
        settings["kv_heads"] = _KV_HEADS[golden.upstream_class]
    return mqa_jax.GroupedQueryAttention(**settings)


def _run_upstream(golden: Golden, weights: Arrays, arguments: list[Any], options: dict[str, Any]) -> Arrays:
    module = _upstream_module(golden, options)
    kv_heads = module.kv_heads or module.heads
    options = {_CALL_NAMES.get(name, name): x for name, x in options.items()}
    for name in ("past_key_value", "prev_layer_key_value"):
        if options.get(name):
            key, value = options[name]
            options[name] = torch_interop.past_key_value_from_torch(key, value, kv_heads)
    params = torch_interop.from_state_dict(weights, heads=module.heads, kv_heads=kv_heads)
    out, attn_weights, present = _apply(module, params, *arguments, **options)
    outputs = {"out": out, "attn_weights": attn_weights}
    if present is not None:
        outputs |= {"present_k": _as_cached(golden, "k", present[0]), "present_v": _as_cached(golden, "v", present[1])}
    return outputs


def _as_cached(golden: Golden, which: str, x: Any) -> Any:
    """Ours is [b, s, kv, hd]; theirs as in `past_key_value_from_torch`."""
    if golden.arrays[f"out/present_{which}"].ndim == 3:
        return x.reshape(*x.shape[:2], -1)
    return x.transpose(0, 2, 3, 1) if which == "k" else x.transpose(0, 2, 1, 3)


# -- FlashMHA ---------------------------------------------------------------------------------------------------------


def _run_flash_attention(golden: Golden, weights: Arrays, arguments: list[Any], options: dict[str, Any]) -> Arrays:
    if weights:
        return _run_lucidrains(golden, weights, arguments, options)
    return {"out": mqa_jax.FlashAttention(**golden.meta["ctor"]).apply({}, *arguments, **options)}


def _run_lucidrains(golden: Golden, weights: Arrays, arguments: list[Any], options: dict[str, Any]) -> Arrays:
    """The repository's other class of that name: projections of `x` and of a context."""
    settings = golden.meta["ctor"]
    causal, heads = settings.get("causal", False), settings["heads"]
    module = mqa_jax.GroupedQueryAttention(
        settings["dim"], heads, kv_heads=heads, head_dim=settings["dim_head"], use_bias=False, attn_impl="torch"
    )
    params = torch_interop.from_state_dict(weights, heads=heads)
    out, _, _ = _apply(
        module, params, *arguments, causal=causal, mask=options.get("mask"), inputs_k=options.get("context")
    )
    return {"out": out}


def _run_flash_mha(golden: Golden, weights: Arrays, arguments: list[Any], options: dict[str, Any]) -> Arrays:
    module = mqa_jax.FlashMHA(**golden.meta["ctor"])
    params = torch_interop.from_state_dict(weights, heads=module.num_heads)
    query = arguments[0]
    return {"out": module.apply({"params": params}, query, query, query)}  # upstream ignores key and value


# -- knotgrass --------------------------------------------------------------------------------------------------------


def _run_knotgrass(golden: Golden, weights: Arrays, arguments: list[Any], options: dict[str, Any]) -> Arrays:
    settings = golden.meta["ctor"]
    kv_heads = {"MultiQueryAttention": 1, "GroupedQueryAttention": settings.get("n_grouped")}
    heads = settings.get("n_head") or settings.get("n_query") or 1
    if "n_grouped" in settings:
        heads = settings["n_grouped"] * settings["n_query_each_group"]
    if golden.upstream_class == "Attention":
        module: Any = mqa_jax.Attention(settings["word_size"], head_dim=settings["embed_dim"])
    else:
        module = mqa_jax.GroupedQueryAttention(
            settings["word_size"],
            heads,
            kv_heads=kv_heads.get(golden.upstream_class, heads),
            head_dim=settings["embed_dim"],
            out_features=settings["embed_dim"],
            use_out_bias=False,
            causal=False,
        )
    params = torch_interop.from_state_dict(weights, heads=heads, kv_heads=module.kv_heads)
    mask = options.get("mask")  # non-zero is kept; it broadcasts to the scores of one text, [s, s]
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)
        mask = jnp.broadcast_to(mask, (*arguments[0].shape[:-1], arguments[0].shape[-2]))
    out, _, _ = _apply(module, params, *arguments, mask=mask)
    return {"out": out}


# -- torch ------------------------------------------------------------------------------------------------------------


def _run_torch_mha(golden: Golden, weights: Arrays, arguments: list[Any], options: dict[str, Any]) -> Arrays:
    settings = golden.meta["ctor"]
    heads = settings["num_heads"]
    module = mqa_jax.MultiHeadAttention(
        settings["embed_dim"],
        heads,
        use_bias=settings.get("bias", True),
        add_bias_kv=settings.get("add_bias_kv", False),
        add_zero_attn=settings.get("add_zero_attn", False),
        causal=False,
    )
    sequence_first = not settings.get("batch_first", False) and arguments[0].ndim == 3
    query, key, value = (jnp.swapaxes(x, 0, 1) if sequence_first else x for x in arguments)
    bias, mask = _torch_mha_masks(options, heads, query.ndim - 2)
    need_weights = options.get("need_weights", True)
    params = torch_interop.from_state_dict(weights, heads=heads)
    out, attn_weights, _ = _apply(
        module, params, query, None, bias, mask, inputs_k=key, inputs_v=value, needs_weights=need_weights
    )
    outputs = {"out": jnp.swapaxes(out, 0, 1) if sequence_first else out}
    if need_weights:
        average = options.get("average_attn_weights", True)
        outputs["attn_weights"] = attn_weights.mean(axis=-3) if average else attn_weights
    return outputs


def _torch_mha_masks(options: dict[str, Any], heads: int, leading: int) -> tuple[Any, Any]:
    """Torch's boolean masks say what is hidden, and a 3-D attn_mask has batch and heads in one axis."""
    attn_mask, padding = options.get("attn_mask"), options.get("key_padding_mask")
    if attn_mask is None:
        return None, None if padding is None else ~jnp.asarray(padding)
    attn_mask = jnp.asarray(attn_mask)
    if attn_mask.ndim == 3:
        attn_mask = attn_mask.reshape(-1, heads, *attn_mask.shape[1:])
    else:
        attn_mask = attn_mask.reshape((1,) * (leading + 1) + attn_mask.shape)
    return (None, ~attn_mask) if attn_mask.dtype == bool else (attn_mask, None)


def _run_torch_sdpa(golden: Golden, weights: Arrays, arguments: list[Any], options: dict[str, Any]) -> Arrays:
    attn_mask = options.get("attn_mask")
    is_bool = attn_mask is not None and attn_mask.dtype == bool
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in arguments)
    out = mqa_jax.dot_product_attention(
        query,
        key,
        value,
        bias=None if is_bool else attn_mask,
        mask=attn_mask if is_bool else None,
        is_causal=options.get("is_causal", False),
        scale=options.get("scale"),
    )
    return {"out": jnp.swapaxes(out, 1, 2)}


_RUNNERS: dict[tuple[str, str], Callable[[Golden, Arrays, list[Any], dict[str, Any]], Arrays]] = {
    ("mqa", "MultiHeadAttention"): _run_upstream,
    ("mqa", "MultiQueryAttention"): _run_upstream,
    ("mqa_flash", "MultiQueryAttention"): _run_upstream,
    ("zeta", "MultiHeadAttention"): _run_upstream,
    ("zeta", "MultiQueryAttention"): _run_upstream,
    ("foundry", "GroupedQueryAttention"): _run_upstream,
    ("foundry", "MultiheadAttention"): _run_upstream,
    ("foundry", "MultiQueryAttention"): _run_upstream,
    ("flashmha_attn", "FlashAttention"): _run_flash_attention,
    ("flashmha", "FlashMHA"): _run_flash_mha,
    ("knot", "Attention"): _run_knotgrass,
    ("knot", "MultiheadAttention"): _run_knotgrass,
    ("knot", "MultiQueryAttention"): _run_knotgrass,
    ("knot", "GroupedQueryAttention"): _run_knotgrass,
    ("torch", "MultiheadAttention"): _run_torch_mha,
    ("torch", "scaled_dot_product_attention"): _run_torch_sdpa,
}
