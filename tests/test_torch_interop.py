"""Weights of PyTorch layers, against PyTorch itself where it is installed; the goldens cover upstream's classes."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mqa_jax
from mqa_jax import torch_interop

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 7, 24)).astype(np.float32)


@pytest.mark.torch
@pytest.mark.parametrize(("kdim", "vdim", "bias"), [(None, None, True), (None, None, False), (10, 6, True)])
def test_torch_multihead_attention(kdim, vdim, bias):
    import torch

    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(24, 6, bias=bias, kdim=kdim, vdim=vdim, batch_first=True)
    key = RNG.standard_normal((2, 5, kdim or 24)).astype(np.float32)
    value = RNG.standard_normal((2, 5, vdim or 24)).astype(np.float32)
    expected, weights = layer(*map(torch.from_numpy, (X, key, value)))
    params = torch_interop.from_state_dict(layer.state_dict(), heads=6)
    module: Any = mqa_jax.MultiHeadAttention(24, 6, causal=False, use_bias=bias)
    out, ours, _ = module.apply({"params": params}, X, inputs_k=key, inputs_v=value, needs_weights=True)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.mean(1), weights.detach().numpy(), atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_a_llama_layer_and_its_gradients(kv_heads):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        hidden_size=24, num_attention_heads=6, num_key_value_heads=kv_heads, head_dim=4, attn_implementation="sdpa"
    )
    config = LlamaConfig(**settings)
    layer: Any = LlamaAttention(config, layer_idx=0)
    x: Any = torch.from_numpy(X).requires_grad_()
    cos_sin = LlamaRotaryEmbedding(config)(x, torch.arange(7)[None])
    expected = layer(x, position_embeddings=cos_sin, attention_mask=None)[0]
    expected.square().sum().backward()
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=kv_heads, rope=mqa_jax.Rope(), use_bias=False)

    def loss(state, x):
        params = torch_interop.from_state_dict(state, heads=6, kv_heads=kv_heads)
        out = module.apply({"params": params}, x)[0]
        return jnp.sum(out**2), out

    state = {name: jnp.asarray(w.detach().numpy()) for name, w in layer.named_parameters()}
    (gradients, d_x), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(state, jnp.asarray(X))
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(d_x, x.grad.numpy(), atol=1e-4)
    for name, weight in layer.named_parameters():
        np.testing.assert_allclose(gradients[name], weight.grad.numpy(), atol=1e-4, err_msg=name)


@pytest.mark.torch
@pytest.mark.parametrize("options", [{}, dict(is_causal=True), dict(scale=0.3)])
def test_sdpa_with_grouped_heads(options):
    import torch

    query, key, value = (RNG.standard_normal((2, 9, n, 16)).astype(np.float32) for n in (6, 2, 2))
    swapped = [torch.from_numpy(x).transpose(1, 2) for x in (query, key, value)]
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    expected = attend(*swapped, enable_gqa=True, **options)
    actual = mqa_jax.dot_product_attention(query, key, value, **options)
    np.testing.assert_allclose(actual, expected.transpose(1, 2).numpy(), atol=1e-5)


def test_a_prefix_picks_one_layer_of_a_model():
    layer = {"Wqkv.weight": RNG.standard_normal((32, 24)), "out_proj.weight": RNG.standard_normal((24, 24))}
    state = {f"blocks.{i}.attn.{name}": x + i for name, x in layer.items() for i in range(2)}
    params = torch_interop.from_state_dict(state, heads=6, kv_heads=1, prefix="blocks.1.attn.")
    np.testing.assert_array_equal(params["value"]["kernel"][:, 0], (layer["Wqkv.weight"][28:] + 1).T)
    assert params["query"]["kernel"].shape == (24, 6, 4)


def test_dtypes_are_kept():
    state = {"Wqkv.weight": np.ones((32, 24), np.float16), "out_proj.weight": np.ones((24, 24), np.float16)}
    params = torch_interop.from_state_dict(state, heads=6, kv_heads=1)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float16")}


def test_it_does_not_import_torch():
    code = "import sys, mqa_jax.torch_interop; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
