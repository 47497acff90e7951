"""Layers that compute what upstream's classes do which cannot be imported here, with their tensors and attributes."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def _module(build: Any) -> Any:
    """`build(module)` makes the parts of a torch module, and returns its `forward`. Random weights."""
    import torch

    torch.manual_seed(0)
    module = torch.nn.Module()
    module.forward = build(module)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def fused(dim: int, heads: int, kv_heads: int, causal: bool) -> Any:
    """mqa, zeta, llm-foundry; and FlashMHA, which is not causal."""
    import torch

    head_dim = dim // heads

    def build(module: Any) -> Any:
        module.n_heads, module.kv_n_heads, module.causal = heads, kv_heads, causal
        module.Wqkv = torch.nn.Linear(dim, (heads + 2 * kv_heads) * head_dim)
        module.out_proj = torch.nn.Linear(dim, dim)
        return functools.partial(forward, module)

    def forward(module: Any, x: Any) -> Any:
        rows = module.Wqkv(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)
        query, key, value = rows.split([heads, kv_heads, kv_heads], dim=1)
        attend = torch.nn.functional.scaled_dot_product_attention
        out = attend(query, key, value, is_causal=module.causal, enable_gqa=True)
        return module.out_proj(out.transpose(1, 2).flatten(-2))

    return _module(build)


def knotgrass_grouped(dim: int, groups: int, heads_of_group: int, head_dim: int) -> Any:
    """Each group has an output projection of its own, before that of all."""
    import torch

    linear = torch.nn.Linear

    def build(module: Any) -> Any:
        module.grouped = torch.nn.ModuleList(torch.nn.Module() for _ in range(groups))
        for group in module.grouped:
            group.querys = torch.nn.ModuleList(linear(dim, head_dim) for _ in range(heads_of_group))
            group.key, group.value = linear(dim, head_dim), linear(dim, head_dim)
            group.proj = linear(head_dim * heads_of_group, head_dim, bias=False)
        module.proj = linear(head_dim * groups, head_dim, bias=False)
        return functools.partial(forward, module)

    def forward(module: Any, x: Any) -> Any:
        results = []
        for group in module.grouped:
            scores = [query(x) @ group.key(x).mT / np.sqrt(head_dim) for query in group.querys]
            results.append(group.proj(torch.cat([score.softmax(-1) @ group.value(x) for score in scores], dim=-1)))
        return module.proj(torch.cat(results, dim=-1))

    return _module(build)


def torch_multihead(dim: int, heads: int) -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(dim, heads)


LAYERS: dict[str, Callable[[], Any]] = {
    "mqa": lambda: fused(24, 6, 1, causal=True),
    "llm-foundry grouped": lambda: fused(24, 6, 2, causal=True),
    "FlashMHA": lambda: fused(24, 6, 6, causal=False),
    "knotgrass grouped": lambda: knotgrass_grouped(24, groups=2, heads_of_group=3, head_dim=4),
    "torch.nn.MultiheadAttention": lambda: torch_multihead(24, 6),
}


def llm_foundry(bias: bool = True) -> Any:
    """A stand-in for a class that cannot be imported: the attributes and tensors that it has."""
    import torch

    torch.manual_seed(0)
    layer: Any = torch.nn.Module()
    layer.n_heads, layer.kv_n_heads, layer.clip_qkv, layer.softmax_scale, layer.attn_dropout_p = 6, 2, 1.5, 0.4, 0.0
    layer.Wqkv, layer.out_proj = torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(24, 24, bias=bias)
    layer.q_ln, layer.k_ln = torch.nn.LayerNorm(24), torch.nn.LayerNorm(8)
    return layer
