"""Torch layers in odd states, and layers that have no counterpart."""

from typing import Any

from hf_layers import hf_layer
from upstream_layers import llm_foundry

from mqa_jax.torch_interop import from_torch, to_torch


def weight_normed(layer):
    import torch

    torch.nn.utils.parametrizations.weight_norm(layer.q_proj)


def pruned(layer):
    import torch
    from torch.nn.utils import prune

    prune.random_unstructured(layer.q_proj, "weight", amount=0.5)
    assert isinstance(layer.q_proj.weight_mask, torch.Tensor)


def with_lora(layer):
    """As PEFT wraps a linear layer."""
    import torch

    part: Any = torch.nn.Module()
    part.base_layer = layer.q_proj
    part.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(24, 2, bias=False)})
    layer.q_proj = part


def of_another_type(layer):
    """As bitsandbytes has its weights, before it moves them to a GPU and packs them."""
    import torch

    class Params4bit(torch.nn.Parameter):
        pass

    layer.q_proj.weight = Params4bit(layer.q_proj.weight.data)


def in_8_bits(layer):
    import torch

    layer.q_proj.weight = torch.nn.Parameter(layer.q_proj.weight.data.to(torch.int8), requires_grad=False)


def on_no_device(layer):
    layer.to("meta")


ODD = {
    weight_normed: (
        NotImplementedError,
        r"LlamaAttention are not only its tensors.*original0.*remove_parametrizations",
    ),
    pruned: (NotImplementedError, r"'q_proj.weight_orig', 'q_proj.weight_mask'\]. Use torch.nn.utils.prune.remove"),
    with_lora: (NotImplementedError, r"'q_proj.lora_A.default.weight'.*merge_and_unload"),
    of_another_type: (NotImplementedError, r"Only plain tensors.*\{'q_proj.weight': 'Params4bit'\}"),
    in_8_bits: (NotImplementedError, r"Quantised weights are not read.*\{'q_proj.weight': 'int8'\}"),
    on_no_device: (ValueError, r"not in memory: device='meta' of \['q_proj.weight'"),
}


def spoiled(spoil):
    layer = hf_layer("llama")
    spoil(layer)
    return from_torch(layer)


def of_gpt_neox():
    import transformers
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention

    config = transformers.GPTNeoXConfig(hidden_size=24, num_attention_heads=6)
    return from_torch(GPTNeoXAttention(config, layer_idx=0), heads=6)


def of_a_subclass():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class MyAttention(LlamaAttention):
        pass

    mine: Any = MyAttention(hf_layer("llama").config, layer_idx=0)
    return from_torch(mine)


def of_cross_attention():
    layer = hf_layer("gpt_bigcode multi-head")
    layer.is_cross_attention = True
    return from_torch(layer)


def with_other_heads():
    return from_torch(hf_layer("llama"), kv_heads=3)


def with_rotary_positions():
    import torch

    class RotaryEmbedding(torch.nn.Module):
        pass

    layer = llm_foundry()
    layer.rotary_emb = RotaryEmbedding()
    return from_torch(layer)


def without_a_counterpart():
    layer = llm_foundry()
    module, variables = from_torch(layer)
    params = {name: x for name, x in variables["params"].items() if name not in ("q_ln", "k_ln")}
    return to_torch(module, {"params": params}, like=layer)


def tied():
    layer = hf_layer("llama")
    module, variables = from_torch(layer)
    layer.v_proj.weight = layer.k_proj.weight
    return to_torch(module, variables, like=layer)


WAY_OUT = r".*from_state_dict\(tensors, heads=..., kv_heads=..., layout=...\).*'falcon'.*"
REFUSED: dict[Any, tuple[type, str]] = {
    of_gpt_neox: (NotImplementedError, rf"model_type='gpt_neox'{WAY_OUT}'query_key_value.weight': \(72, 24\)"),
    of_a_subclass: (NotImplementedError, rf"MyAttention is not the attention of llama{WAY_OUT}'q_proj.weight'"),
    of_cross_attention: (NotImplementedError, rf"is_cross_attention=True{WAY_OUT}'c_attn.weight'"),
    with_other_heads: (ValueError, r"other numbers of heads: its \{'kv_heads': 2\}, given \{'kv_heads': 3\}"),
    with_rotary_positions: (ValueError, r"rotary positions in \['rotary_emb'\], but does not declare them: pass rope="),
    without_a_counterpart: (ValueError, r"Module have no Flax counterpart: \['q_ln.weight'"),
    tied: (ValueError, r"one tensor for several Flax parameters that differ: \['k_proj.weight'"),
}
