"""Live torch layers as our modules, and back."""

from typing import Any

import jax
import numpy as np
import pytest
from hf_layers import CONFIGS, hf_layer
from test_torch_interop import STATES, weights

import mqa_jax
from mqa_jax.torch_interop import from_torch, to_torch

pytestmark = pytest.mark.torch


def equal(layer, other) -> bool:
    pairs = zip(layer.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == name_ and (x == x_).all() and x.dtype == x_.dtype for (name, x), (name_, x_) in pairs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_of_transformers_there_and_back(name):
    layer = hf_layer(name)
    module, variables = from_torch(layer)
    zeros = jax.tree.map(np.zeros_like, variables)
    assert not equal(to_torch(module, zeros, like=layer), layer)
    assert equal(to_torch(module, variables, like=to_torch(module, zeros, like=layer)), layer)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), np.zeros((1, 3, 24), np.float32), deterministic=True)
    )
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)


@pytest.mark.parametrize("options", [{}, dict(bias=False), dict(kdim=10, vdim=6), dict(add_bias_kv=True)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_multihead_attention(options, batch_first):
    import torch

    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(24, 6, batch_first=batch_first, **options)
    module, variables = from_torch(layer)
    assert equal(to_torch(module, variables, like=layer), layer)
    inputs = [torch.randn(2, 5, width) for width in (24, options.get("kdim", 24), options.get("vdim", 24))]
    arranged = inputs if batch_first else [x.transpose(0, 1) for x in inputs]
    expected = layer(*arranged)[0]
    expected = expected if batch_first else expected.transpose(0, 1)
    x, key, value = (x.numpy() for x in inputs)
    out = module.apply(variables, x, inputs_k=key, inputs_v=value, deterministic=True)[0]
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)


def llm_foundry(bias: bool = True) -> Any:
    """A stand-in for a class that cannot be imported: the attributes and tensors that it has."""
    import torch

    torch.manual_seed(0)
    layer: Any = torch.nn.Module()
    layer.n_heads, layer.kv_n_heads, layer.clip_qkv, layer.softmax_scale, layer.attn_dropout_p = 6, 2, 1.5, 0.4, 0.0
    layer.Wqkv, layer.out_proj = torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(24, 24, bias=bias)
    layer.q_ln, layer.k_ln = torch.nn.LayerNorm(24), torch.nn.LayerNorm(8)
    return layer


def test_a_class_that_is_recognised_by_its_tensors():
    layer = llm_foundry()
    module, variables = from_torch(layer, causal=False)
    assert module == mqa_jax.GroupedQueryAttention(
        24,
        6,
        kv_heads=2,
        head_dim=4,
        clip_qkv=1.5,
        softmax_scale=0.4,
        qk_ln=True,
        norm_type="layernorm",
        causal=False,
        use_bias=True,
        use_out_bias=True,
        out_features=24,
    )
    assert equal(to_torch(module, variables, like=layer), layer)


def module_of(state: dict[str, np.ndarray]) -> Any:
    """A torch module with these parameters, as a class has them that cannot be imported here."""
    import torch

    root = torch.nn.Module()
    for name, x in state.items():
        *path, leaf = name.split(".")
        node: Any = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, torch.nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(leaf, torch.nn.Parameter(torch.from_numpy(x)))
    return root


@pytest.mark.parametrize("name", STATES)
def test_every_layout_as_a_live_module(name):
    layout, heads, kv_heads, state = STATES[name]
    layer = module_of(state)
    told: dict[str, Any] = {} if "knotgrass" in layout else dict(heads=heads, kv_heads=kv_heads)
    if layout == "unfused_without_keys":
        told = dict(heads=heads)
    module, variables = from_torch(layer, **told)
    assert (module.heads, module.kv_heads or heads) == (heads, kv_heads)
    assert module.causal == ("knotgrass" not in layout)
    zeros = to_torch(module, jax.tree.map(np.zeros_like, variables), like=layer)
    assert not equal(zeros, layer)
    assert equal(to_torch(module, variables, like=zeros), layer)


def test_flash_mha_and_llm_foundry_tell_more():
    layer = module_of(weights({"Wqkv": 72}, out="out_proj"))
    layer.num_heads, layer.causal = 6, False
    module, _ = from_torch(layer)
    assert (module.heads, module.kv_heads, module.causal) == (6, None, False)
    layer = llm_foundry()
    layer.sliding_window_size, layer.attn_logit_softcapping = 5, 2.5
    module, _ = from_torch(layer)
    assert (module.local_window_size, module.logits_soft_cap) == (5, 2.5)
    layer.sliding_window_size = -1
    assert from_torch(layer)[0].local_window_size is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_are_kept(dtype):
    import torch

    layer = hf_layer("llama").to(getattr(torch, dtype))
    for parameter in layer.parameters():  # with all the bits that the dtype has
        torch.nn.init.normal_(parameter)
    module, variables = from_torch(layer)
    assert {x.dtype.name for x in jax.tree.leaves(variables)} == {dtype}
    zeros = to_torch(module, jax.tree.map(np.zeros_like, variables), like=layer)
    assert equal(to_torch(module, variables, like=zeros), layer)


def test_heads_that_nobody_tells():
    layer = llm_foundry()
    del layer.n_heads
    with pytest.raises(ValueError, match=r"Module does not tell its number of heads: heads=None. Pass heads="):
        from_torch(layer)
    assert from_torch(layer, heads=6)[0].heads == 6


def test_parameters_of_another_layer():
    module, variables = from_torch(llm_foundry(bias=False))
    with pytest.raises(ValueError, match=r"do not fit Module; ours and its shapes: \{'Wqkv.bias': \(\(40,\), None\)"):
        to_torch(*from_torch(llm_foundry()), like=llm_foundry(bias=False))
    other = llm_foundry()
    other.kv_n_heads = 3
    with pytest.raises(
        ValueError, match=r"Module has other heads than our module: its \{'kv_heads': 3\}, ours \{'heads': 6"
    ):
        to_torch(module, variables, like=other)
    with pytest.raises(ValueError, match="No known attention layout"):
        to_torch(module, variables, like=llm_foundry().q_ln)
