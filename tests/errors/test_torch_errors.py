"""What conversions from and to PyTorch, and configs of Hugging Face, refuse."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from wrong_calls import refused

import mqa_jax
from mqa_jax import torch_interop
from mqa_jax.torch_interop import arrays as torch_arrays
from mqa_jax.torch_interop import modules as torch_modules
from mqa_jax.torch_interop import parity
from mqa_jax.torch_interop.hugging_face import attention as hf_attention


def _state(heads=2, dim=8, **changes):
    rng = np.random.default_rng(0)
    state = {
        "Wqkv.weight": rng.standard_normal((dim + 2 * dim // heads, dim)),
        "out_proj.weight": rng.standard_normal((dim, dim)),
    }
    return {name: x for name, x in {**state, **changes}.items() if x is not None}


convert = functools.partial(torch_interop.from_state_dict, heads=2, kv_heads=1)
TORCH = {
    "config: layer": (
        lambda: hf_attention.attention_of(dict(model_type="llama", num_hidden_layers=2), -1),
        r"numbered from 0 to num_hidden_layers - 1: layer=-1, num_hidden_layers=2",
    ),
    "config: layers": (
        lambda: hf_attention.layers_of(dict(model_type="llama")),
        r"does not have the number of layers: num_hidden_layers=None",
    ),
    "layouts of one name": (
        lambda: torch_interop.from_state_dict(
            {"c_attn.weight": np.ones((24, 8)), "c_proj.weight": np.ones((8, 8))}, heads=2
        ),
        r"Several layouts have a c_attn.weight of shape \(24, 8\).*layout='gpt_bigcode' or 'nanogpt'",
    ),
    "unknown": (lambda: convert({"w": np.ones((2, 3))}), r"No known attention layout: found \{'w': \(2, 3\)\}.*Wqkv"),
    "prefix": (lambda: convert(_state(), prefix="layers.0."), r"found \{\}; expected one of .*Is the prefix right"),
    "layout": (lambda: convert(_state(), layout="qkv"), r"Unknown layout='qkv': use one of \['fused', 'unfused'"),
    "another layout": (
        lambda: convert(_state(), layout="llama"),
        r"missing: q_proj.weight, .*; unexpected: Wqkv.weight",
    ),
    "missing": (
        lambda: convert(_state(**{"out_proj.weight": None})),
        r"layout='fused' with heads=2, kv_heads=1. missing: out_proj.weight. Found .* expected .*out_proj.weight",
    ),
    "to_jax: float64": (
        lambda: torch_arrays.to_jax(SimpleNamespace(dtype="torch.float64")),
        r"JAX would narrow this tensor: dtype='float64'. Cast it, or jax.config.update\('jax_enable_x64', True\)",
    ),
    "one bias of three": (
        lambda: convert(
            {**{f"{n}_proj.weight": np.ones((8, 8)) for n in "qkvo"}, "q_proj.bias": np.ones(8)}, kv_heads=2
        ),
        r"missing: k_proj.bias, v_proj.bias",
    ),
    "extra": (
        lambda: convert(_state(**{"rotary.inv_freq": np.ones(4)})),
        r"unexpected: rotary.inv_freq. Found .*'rotary.inv_freq': \(4,\)",
    ),
    "heads": (lambda: convert(_state(), heads=3), r"heads=3, kv_heads=1. .*not divisible by heads: Wqkv.weight"),
    "kv_heads": (lambda: convert(_state(), kv_heads=3), r"heads must be a multiple of kv_heads: heads=2, kv_heads=3"),
    "output": (
        lambda: convert(_state(**{"out_proj.weight": np.ones((8, 6))})),
        r"misshapen: out_proj.weight. Found .*'out_proj.weight': \(8, 6\).*expected .*'out_proj.weight': \(None, 8\)",
    ),
    "transposed": (
        lambda: convert({"c_attn.weight": np.ones((12, 24)), "c_proj.weight": np.ones((12, 12))}, heads=3),
        r"layout='gpt_bigcode'.*misshapen: .*c_proj.weight.*not divisible by heads: c_attn.weight",
    ),
    "cache": (
        lambda: torch_interop.past_key_value_from_torch(np.ones((2, 3, 4, 5)), np.ones((2, 3, 4, 5)), 2),
        r"A cache is \[b, kv, head_dim, s\].*kv_heads=2",
    ),
    "heads of a module": (
        lambda: torch_modules.from_torch(SimpleNamespace(state_dict=_state)),
        r"SimpleNamespace does not declare its number of heads: heads=None. Pass heads=, and kv_heads=",
    ),
    "dtype to compare in": (
        lambda: parity.tolerance_of("float64"),
        r"compared in one of \['float32', 'bfloat16', 'float16'\]: dtype='float64'. Cast the layer",
    ),
    "nothing to plot": (
        lambda: parity.Report(()).plot(Path("nowhere.png")),
        r"There is nothing to plot: this torch layer has no single output projection",
    ),
    "another module": (
        lambda: torch_modules.to_torch(
            mqa_jax.MultiQueryAttention(8, 2),
            {"params": convert(_state())},
            like=SimpleNamespace(state_dict=lambda: _state(dim=4)),
        ),
        r"do not fit SimpleNamespace; Flax and torch shapes: \{'Wqkv.weight': \(\(16, 8\), \(8, 4\)\)",
    ),
    "a module with other heads": (
        lambda: torch_modules.to_torch(
            mqa_jax.MultiQueryAttention(8, 2), {}, like=SimpleNamespace(state_dict=_state, n_heads=4)
        ),
        r"SimpleNamespace has other heads than the Flax module: \{'heads': 4\} instead of \{'heads': 2, 'kv_heads'",
    ),
    "no keys to write": (
        lambda: torch_interop.to_state_dict({"query": {"kernel": np.ones((8, 2, 4))}}, layout="fused"),
        r"found \['query'\], expected \['key', 'out', 'query', 'value'\] and optionally \['k_ln', 'q_ln'\]",
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_wrong_calls(name):
    refused(ValueError, TORCH[name])


NOT_POSSIBLE: dict[str, Any] = {
    "torch: packed": (
        lambda: torch_interop.from_state_dict({"q_proj._packed_params": (1, 2)}, heads=2),
        r"Only arrays are read, not packed weights: q_proj._packed_params is a tuple",
    ),
    "config: model": (
        lambda: hf_attention.attention_of(dict(model_type="gpt2")),
        r"No known attention layer: model_type='gpt2', known are \['bert', 'falcon'",
    ),
    "config: a field that nobody reads": (
        lambda: hf_attention.attention_of(
            dict(model_type="bert", hidden_size=8, num_attention_heads=2, position_embedding_type="relative_key")
        ),
        r"not read here for model_type='bert': position_embedding_type='relative_key'. Set up GroupedQueryAttention",
    ),
    "config: rope": (
        lambda: hf_attention.rope_of(dict(rope_scaling=dict(type="dynamic", factor=2.0))),
        r"RoPE scaling is one of \['default', 'linear', 'llama3', 'yarn'\]: rope_type='dynamic'",
    ),
    "config: mpt": (
        lambda: hf_attention.attention_of(
            dict(model_type="mpt", d_model=8, n_heads=2, attn_config=dict(qk_ln=True, alibi_bias_max=4))
        ),
        r"transformers ignores these settings of MPT: attn_config=\{'alibi_bias_max': 4, 'qk_ln': True\}",
    ),
}


@pytest.mark.parametrize("name", NOT_POSSIBLE)
def test_what_is_not_converted(name):
    refused(NotImplementedError, NOT_POSSIBLE[name])
