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


# -- every layout, there and back -------------------------------------------------------------------------------------


def weights(rows: dict[str, int], columns: int = 24, out: str | None = None, width: int = 24, bias: bool = True):
    """Random linear layers, by name, with so many rows."""
    sizes = {name: (count, columns) for name, count in rows.items()} | ({out: (24, width)} if out else {})
    state = {f"{name}.weight": RNG.standard_normal(size) for name, size in sizes.items()}
    return state | ({f"{name}.bias": RNG.standard_normal(size[0]) for name, size in sizes.items()} if bias else {})


NORMS = {f"{norm}.{part}": RNG.standard_normal(24) for norm in ("q_ln", "k_ln") for part in ("weight", "bias")}
KNOTGRASS = {f"{name}.{i}": 4 for name in ("grouped.0.querys", "grouped.1.querys") for i in range(3)}
STATES: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # layout, heads, kv_heads, tensors
    "fused": ("fused", 6, 2, {**weights({"Wqkv": 40}, out="out_proj"), **NORMS}),
    "fused without bias": ("fused", 6, 1, weights({"Wqkv": 32}, out="out_proj", bias=False)),
    "unfused": ("unfused", 6, 2, weights({"Wq": 24, "Wk": 8, "Wv": 8}, out="out_proj")),
    "reused keys": ("unfused_without_keys", 6, 6, weights({"Wq": 24}, out="out_proj")),
    "llama": ("llama", 6, 2, weights({"q_proj": 24, "k_proj": 8, "v_proj": 8}, out="o_proj")),
    "falcon 40B": ("falcon", 6, 2, weights({"query_key_value": 40}, out="dense")),
    "falcon 7B": ("falcon", 6, 1, weights({"query_key_value": 32}, out="dense", bias=False)),
    "bigcode": ("gpt_bigcode", 6, 6, weights({"c_attn": 72}, out="c_proj")),
    "bert": ("bert", 6, 6, weights({f"self.{n}": 24 for n in ("query", "key", "value")}, out="output.dense")),
    "lucidrains": ("lucidrains", 6, 6, weights({"to_q": 24, "to_kv": 48}, out="to_out", bias=False)),
    "one head": ("knotgrass", 1, 1, weights({"query": 4, "key": 4, "value": 4})),
    "knotgrass multi-head": (
        "knotgrass_multihead",
        2,
        2,
        weights({f"multihead.{i}.{n}": 4 for i in range(2) for n in ("query", "key", "value")})
        | weights({}, out="proj", width=8, bias=False),
    ),
    "knotgrass multi-query": (
        "knotgrass_multiquery",
        3,
        1,
        weights({"querys.0": 4, "querys.1": 4, "querys.2": 4, "key": 4, "value": 4})
        | weights({}, out="proj", width=12, bias=False),
    ),
    "torch": (
        "torch",
        6,
        6,
        {
            "in_proj_weight": RNG.standard_normal((72, 24)),
            "in_proj_bias": RNG.standard_normal(72),
            "bias_k": RNG.standard_normal((1, 1, 24)),
            "bias_v": RNG.standard_normal((1, 1, 24)),
            **weights({}, out="out_proj"),
        },
    ),
    "torch with kdim": (
        "torch_kdim",
        6,
        6,
        {
            "q_proj_weight": RNG.standard_normal((24, 24)),
            "k_proj_weight": RNG.standard_normal((24, 10)),
            "v_proj_weight": RNG.standard_normal((24, 6)),
            "in_proj_bias": RNG.standard_normal(72),
            **weights({}, out="out_proj"),
        },
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_round_trip_is_bitwise(name):
    layout, heads, kv_heads, state = STATES[name]
    params = torch_interop.from_state_dict(state, heads=heads, kv_heads=kv_heads)
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
    params = torch_interop.from_state_dict(state, heads=6, kv_heads=2)
    rows = state["query_key_value.weight"].reshape(2, 5, 4, 24)
    np.testing.assert_array_equal(params["query"]["kernel"], rows[:, :3].reshape(6, 4, 24).transpose(2, 0, 1))
    np.testing.assert_array_equal(params["key"]["kernel"], rows[:, 3].transpose(2, 0, 1))
    np.testing.assert_array_equal(params["value"]["kernel"], rows[:, 4].transpose(2, 0, 1))


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
