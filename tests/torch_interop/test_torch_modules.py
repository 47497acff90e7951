"""Live torch layers as our modules, and back."""

from typing import Any

import jax
import numpy as np
import pytest
from hf_layers import CONFIGS, hf_layer
from odd_layers import ODD, REFUSED, in_8_bits
from test_torch_interop import AMBIGUOUS, STATES, weights
from upstream_layers import llm_foundry

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
    lie: dict[str, Any] = dict(layout=layout) if name in AMBIGUOUS else {}
    module, variables = from_torch(layer, **told, **lie)
    assert (module.heads, module.kv_heads or heads) == (heads, kv_heads)
    assert module.causal == ("knotgrass" not in layout)
    zeros = to_torch(module, jax.tree.map(np.zeros_like, variables), like=layer, **lie)
    assert not equal(zeros, layer)
    assert equal(to_torch(module, variables, like=zeros, **lie), layer)


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
    with pytest.raises(ValueError, match=r"Module does not declare its number of heads: heads=None. Pass heads="):
        from_torch(layer)
    assert from_torch(layer, heads=6)[0].heads == 6


def test_parameters_of_another_layer():
    module, variables = from_torch(llm_foundry(bias=False))
    with pytest.raises(ValueError, match=r"do not fit Module; Flax and torch shapes: \{'Wqkv.bias': \(\(40,\), None\)"):
        to_torch(*from_torch(llm_foundry()), like=llm_foundry(bias=False))
    other = llm_foundry()
    other.kv_n_heads = 3
    with pytest.raises(
        ValueError, match=r"Module has other heads than the Flax module: \{'kv_heads': 3\} instead of \{'heads': 6"
    ):
        to_torch(module, variables, like=other)
    with pytest.raises(ValueError, match="No known attention layout"):
        to_torch(module, variables, like=llm_foundry().q_ln)


@pytest.mark.parametrize("refused", REFUSED, ids=lambda f: f.__name__)
def test_what_is_refused(refused):
    """A class that is not known comes with a way out: layouts, and the layer's own tensors and shapes."""
    error, message = REFUSED[refused]
    with pytest.raises(error, match=message):
        refused()


@pytest.mark.parametrize("spoil", ODD, ids=lambda f: f.__name__)
def test_weights_that_are_not_plain_tensors(spoil):
    error, message = ODD[spoil]
    layer = hf_layer("llama")
    variables = from_torch(layer)
    spoil(layer)
    with pytest.raises(error, match=message):
        from_torch(layer)
    if spoil is not in_8_bits:
        with pytest.raises(error, match=message):
            to_torch(*variables, like=layer)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation_of_torch():
    import torch

    layer = torch.nn.Module()
    layer.q_proj = torch.ao.nn.quantized.dynamic.Linear(24, 24)
    with pytest.raises(NotImplementedError, match=r"q_proj._packed_params.*the layer before it was quantised"):
        from_torch(layer, heads=6)


def test_frozen_tied_and_in_training_mode():
    """Nothing of this changes what the layer computes without dropout."""
    layer = hf_layer("llama").train().requires_grad_(False)
    layer.config.attention_dropout = 0.25
    assert from_torch(layer)[0].attn_pdrop == 0.25
    layer.v_proj.weight = layer.k_proj.weight
    module, variables = from_torch(layer)
    params = variables["params"]
    np.testing.assert_array_equal(params["key"]["kernel"], params["value"]["kernel"])
    assert equal(to_torch(module, variables, like=layer), layer)


def test_a_file_that_was_quantised():
    """Of GGUF files transformers makes plain floats, and keeps in the config what they were."""
    layer = hf_layer("llama")
    expected = from_torch(layer)[0]
    layer.config.quantization_config = dict(quant_method="gguf")
    assert from_torch(layer)[0] == expected


def test_hooks_are_told_of():
    layer = hf_layer("llama")
    layer.q_proj.register_forward_hook(lambda module, arguments, out: 2 * out)
    with pytest.warns(
        UserWarning, match=r"Hooks .* are not converted, and this LlamaAttention has some in \['q_proj'\]"
    ):
        from_torch(layer)


def test_cross_attention_of_bert():
    import torch
    import transformers
    from transformers.models.bert.modeling_bert import BertAttention

    torch.manual_seed(0)
    settings: Any = CONFIGS["bert"] | dict(is_decoder=True, add_cross_attention=True, attn_implementation="eager")
    layer: Any = BertAttention(transformers.BertConfig(**settings), layer_idx=0, is_cross_attention=True).eval()
    module, variables = from_torch(layer)
    assert not module.causal
    x, context = torch.randn(2, 7, 24), torch.randn(2, 5, 24)
    expected = layer.output.dense(layer.self(x, encoder_hidden_states=context)[0]).detach().numpy()
    out = module.apply(variables, x.numpy(), inputs_k=context.numpy(), deterministic=True)[0]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_what_is_told_twice():
    layer = hf_layer("llama")
    assert from_torch(layer, heads=6, kv_heads=2)[0] == from_torch(layer)[0]


def test_more_that_unknown_classes_have():
    """A `config` that is none of transformers'; temperature."""
    layer = llm_foundry()
    layer.config = object()
    layer.attn_temperature_tuning = dict(attn_scale=0.2, floor_scale=4)
    expected = mqa_jax.TemperatureTuning(attn_scale=0.2, floor_scale=4)
    assert from_torch(layer)[0].attn_temperature_tuning == expected
