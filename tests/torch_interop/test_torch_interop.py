"""Weights of PyTorch layers, against PyTorch itself where it is installed; the goldens cover upstream's classes."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_states import AMBIGUOUS, KNOTGRASS, RNG, STATES, weights

import mqa_jax
from mqa_jax import torch_interop

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


@pytest.mark.parametrize("name", STATES)
def test_a_round_trip_is_bitwise(name):
    layout, heads, kv_heads, state = STATES[name]
    told = layout if name in AMBIGUOUS else None
    params = torch_interop.from_state_dict(state, heads=heads, kv_heads=kv_heads, layout=told)
    back = torch_interop.to_state_dict(params, layout=layout, prefix="attn.")
    assert {f"attn.{name}" for name in state} == set(back)
    for name, x in state.items():
        np.testing.assert_array_equal(back[f"attn.{name}"], x, err_msg=name)


def test_two_output_projections_come_back_as_one():
    rows = KNOTGRASS | {f"grouped.{g}.{n}": 4 for g in range(2) for n in ("key", "value")}
    state = weights(rows) | {f"grouped.{g}.proj.weight": RNG.standard_normal((5, 12)) for g in range(2)}
    state["proj.weight"] = RNG.standard_normal((5, 10))
    convert: Any = lambda state: torch_interop.from_state_dict(state, heads=6, kv_heads=2)
    params = convert(state)
    assert params["out"]["kernel"].shape == (6, 4, 5)
    back = torch_interop.to_state_dict(params, layout="knotgrass_grouped")
    assert {name: x.shape for name, x in back.items()} == {name: x.shape for name, x in state.items()}
    jax.tree.map(np.testing.assert_array_equal, convert(back), params)


def test_the_order_of_rows_in_groups():
    """Falcon's `query_key_value.view(groups, heads / groups + 2, H)`."""
    state = weights({"query_key_value": 40}, out="dense", bias=False)
    params = torch_interop.from_state_dict(state, heads=6, kv_heads=2, layout="falcon")
    rows = state["query_key_value.weight"].reshape(2, 5, 4, 24)
    np.testing.assert_array_equal(params["query"]["kernel"], rows[:, :3].reshape(6, 4, 24).transpose(2, 0, 1))
    np.testing.assert_array_equal(params["key"]["kernel"], rows[:, 3].transpose(2, 0, 1))
    np.testing.assert_array_equal(params["value"]["kernel"], rows[:, 4].transpose(2, 0, 1))


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_layouts_that_share_names(name):
    """One says how the others differ; and where all say the same, none is asked for."""
    _, heads, kv_heads, state = STATES[name]
    both = r"'falcon': 'q0 q1 q2 k0 v0 q3 ...', 'chatglm': 'q0 q1 q2 q3 q4 q5 ...'"
    if "c_attn.weight" in state:
        both = r"'gpt_bigcode': 'q0 k0 v0 q1 ...', 'nanogpt': 'q0 q1 q2 q3 ...'"
    with pytest.raises(
        ValueError, match=rf"another order: \{{{both}\}}. Say which, with heads=6, .*layout='\w+' or '\w+'"
    ):
        torch_interop.from_state_dict(state, heads=heads, kv_heads=kv_heads)
    fused = next(key for key in state if key in ("c_attn.weight", "query_key_value.weight"))
    one = dict(state) | {fused: RNG.standard_normal((32, 24))}
    one = {key: x for key, x in one.items() if not key.endswith("bias")}
    names = ("gpt_bigcode", "nanogpt") if fused == "c_attn.weight" else ("falcon", "chatglm")
    every = [torch_interop.from_state_dict(one, heads=6, kv_heads=1, layout=layout) for layout in (None, *names)]
    for params in every[1:]:
        jax.tree.map(np.testing.assert_array_equal, params, every[0])


@pytest.mark.torch
def test_gpt2():
    """Its weights are [in, out], and a causal mask lies beside them."""
    import torch
    import transformers
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(n_embd=24, n_head=6, n_positions=16, attn_implementation="eager")
    config = transformers.GPT2Config(**settings)
    layer: Any = GPT2Attention(config, layer_idx=0).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)
    expected = layer(torch.from_numpy(X), attention_mask=mask[None, None])[0]
    state = layer.state_dict() | {"bias": torch.ones(1, 1, 16, 16).tril().bool(), "masked_bias": torch.tensor(-1e4)}
    params = torch_interop.from_state_dict(state, heads=6)
    out = mqa_jax.MultiHeadAttention(24, 6).apply({"params": params}, X)[0]
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)


def test_tensors_that_say_nothing_of_the_layer():
    state = weights({"q_proj": 24, "k_proj": 8, "v_proj": 8}, out="o_proj")
    expected = torch_interop.from_state_dict(state, heads=6, kv_heads=2)
    more = state | {"rotary_emb.inv_freq": np.ones(2), "masked_bias": np.array(-1e4)}
    jax.tree.map(np.testing.assert_array_equal, torch_interop.from_state_dict(more, heads=6, kv_heads=2), expected)


LLAMA = weights({"q_proj": 24, "k_proj": 24, "v_proj": 24}, out="o_proj", bias=False)
WRONG_STATES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "norms": (LLAMA | {"q_norm.weight": np.ones(4)}, {}, r"unexpected: q_norm.weight"),
    "LoRA": (LLAMA | {"q_proj.lora_A.weight": np.ones((2, 24))}, {}, r"unexpected: q_proj.lora_A.weight"),
    "sinks": (LLAMA | {"sinks": np.ones(6)}, {}, r"unexpected: sinks"),
    "a bias of one": (LLAMA | {"q_proj.bias": np.ones(24)}, {}, r"missing: k_proj.bias, v_proj.bias"),
    "no output": ({n: x for n, x in LLAMA.items() if n[0] != "o"}, {}, r"missing: o_proj.weight"),
    "a bias that is no mask": (LLAMA | {"bias": np.ones(24)}, {}, r"unexpected: bias"),
    "fewer key heads than the layout has": (
        STATES["torch"][3],
        dict(kv_heads=2),
        r"layout='torch' has .* heads: \{'query': 6, 'key': 6, 'value': 6\}; given were heads=6, kv_heads=2",
    ),
    "more heads than the layout has": (
        STATES["one head"][3],
        {},
        r"layout='knotgrass' has these numbers of heads: \{'query': 1, 'key': 1, 'value': 1\}; given were heads=6",
    ),
    "wrong heads of a layout that shares its name": (
        STATES["bigcode multi-query"][3],
        {},
        r"do not fit layout='gpt_bigcode' with heads=6, kv_heads=6.*misshapen: c_attn.weight",
    ),
}


def from_state(state, options, message):
    return torch_interop.from_state_dict(state, heads=6, **options)


@pytest.mark.parametrize("name", WRONG_STATES)
def test_states_that_are_refused(name):
    with pytest.raises(ValueError, match=WRONG_STATES[name][-1]):
        from_state(*WRONG_STATES[name])


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float8_e4m3fn"])
def test_quantised_weights_are_refused(dtype):
    state = LLAMA | {"k_proj.weight": np.ones((24, 24), jnp.dtype(dtype))}
    with pytest.raises(
        NotImplementedError, match=rf"only floats of 16 bits and more: dtype \{{'k_proj.weight': '{dtype}'"
    ):
        torch_interop.from_state_dict(state, heads=6)


def on_no_device():
    import torch

    return torch_interop.from_state_dict(
        {name: torch.zeros(x.shape, device="meta") for name, x in LLAMA.items()}, heads=6
    )


@pytest.mark.torch
def test_tensors_without_numbers():
    import torch

    with pytest.raises(ValueError, match=r"not dense in memory.*q_proj.weight has device='meta'.*Load the weights"):
        on_no_device()
    with pytest.raises(ValueError, match=r"q_proj.weight has device='cpu', layout=torch.sparse_coo"):
        torch_interop.from_state_dict({"q_proj.weight": torch.eye(24).to_sparse()}, heads=6)
    with pytest.raises(NotImplementedError, match=r"not packed weights: q_proj._packed_params is a tuple"):
        torch_interop.from_state_dict({"q_proj._packed_params": (1, 2)}, heads=6)


def test_heads_that_a_layout_has_not():
    """A kernel of other heads than the layout's does not lose some of them on the way out."""
    params = torch_interop.from_state_dict(STATES["llama"][3], heads=6, kv_heads=2)
    with pytest.raises(ValueError, match=r"layout='torch' has these numbers of heads.*given were heads=6, kv_heads=2"):
        torch_interop.to_state_dict(params, layout="torch")


def test_rotary_conventions():
    """Reordered weights under one convention do what the originals do under the other."""
    state = weights({"q_proj": 24, "k_proj": 8, "v_proj": 8}, out="o_proj", bias=False)
    state = {name: x.astype(np.float32) for name, x in state.items()}
    reordered = dict(state)
    for name, heads in (("q_proj.weight", 6), ("k_proj.weight", 2)):
        reordered[name] = torch_interop.interleaved_to_halves(state[name], heads)
        np.testing.assert_array_equal(torch_interop.halves_to_interleaved(reordered[name], heads), state[name])
    outputs = [
        mqa_jax.GroupedQueryAttention(
            24, 6, kv_heads=2, use_bias=False, rope=mqa_jax.Rope(interleaved=interleaved)
        ).apply({"params": torch_interop.from_state_dict(tensors, heads=6, kv_heads=2)}, X)[0]
        for tensors, interleaved in ((state, True), (reordered, False))
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-4)


@pytest.mark.torch
def test_bfloat16_and_no_copies():
    """A tensor that needs no stacking is seen where it lies."""
    import torch

    tensor = torch.randn(24, 24).bfloat16()
    state = dict.fromkeys(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"), tensor)
    kernel = torch_interop.from_state_dict(state, heads=6)["out"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert kernel.__array_interface__["data"][0] == tensor.data_ptr()
    np.testing.assert_array_equal(kernel.reshape(24, 24).T.astype(np.float32), tensor.float().numpy())


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
