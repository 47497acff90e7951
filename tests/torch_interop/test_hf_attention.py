"""Attention layers of Hugging Face models against vectors that transformers computed.

A vector has the config, the attention weights of the first layer, what went into it and came out, and the cache of that
layer after all tokens. They were made by running transformers 5.23 on a CPU with torch 2.13, in float32.
"""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_modules import FOLDER

import mqa_jax
from mqa_jax import torch_interop
from mqa_jax.positions import falcon_alibi
from mqa_jax.torch_interop.hugging_face import attention as hf_attention

NAMES = sorted(path.stem for path in FOLDER.glob("hf_*.npz"))


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return json.loads(str(file["meta"])), {key: file[key] for key in file.files if key != "meta"}


def converted(meta, arrays):
    module, family = hf_attention.attention_of(meta["config"])
    assert meta["prefix"] == family.prefix.format(0)
    weights = {f"{meta['prefix']}{key[2:]}": x for key, x in arrays.items() if key.startswith("w/")}
    options: dict[str, Any] = dict(heads=module.heads, kv_heads=module.kv_heads, prefix=meta["prefix"])
    options["layout"] = family.layout
    params = torch_interop.from_state_dict(weights, **options)
    back = torch_interop.to_state_dict(params, layout=family.layout, prefix=meta["prefix"])
    assert set(back) == set(weights)
    for key, x in weights.items():
        np.testing.assert_array_equal(back[key], x)
    return dataclasses.replace(module, deterministic=True), params


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_caches(name):
    """The whole text at once, and a prompt and two steps through our cache, which then holds what theirs does."""
    meta, arrays = load(name)
    module, params = converted(meta, arrays)
    x = arrays["in/x"]
    np.testing.assert_allclose(module.apply({"params": params}, x)[0], arrays["out/out"], atol=1e-5)
    cache: Any = module.init_cache(len(x), x.shape[1])
    step = jax.jit(lambda cache, x: module.apply({"params": params, "cache": cache}, x, mutable=["cache"]))
    start, outputs = 0, []
    for length in (x.shape[1] - 2, 1, 1):
        (out, _, _), changed = step(cache, x[:, start : start + length])
        cache, start = changed["cache"], start + length
        outputs.append(out)
    np.testing.assert_allclose(np.concatenate(outputs, 1), arrays["out/out"], atol=1e-5)
    for ours, theirs in (("cached_key", "out/cache_key"), ("cached_value", "out/cache_value")):
        expected = arrays[theirs].swapaxes(1, 2)  # [b, s, heads, hd]; Falcon 40B repeats its for each query head
        repeats = expected.shape[2] // cache[ours].shape[2]
        np.testing.assert_allclose(np.repeat(cache[ours], repeats, axis=2), expected, atol=1e-5)


def test_every_family_has_a_vector_or_weights():
    covered = {load(name)[0]["config"]["model_type"] for name in NAMES}
    assert set(hf_attention.FAMILIES) - covered == {"mistral", "qwen2", "bert"}  # these are compared with live layers


@pytest.mark.torch
@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_a_live_model_with_a_window_in_some_layers(model_type):
    """Outputs and gradients of both layers, from what transformers gives them."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings: dict[str, Any] = dict(
        vocab_size=31, hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=6
    )
    settings |= dict(num_key_value_heads=2, head_dim=8, sliding_window=4, rope_theta=500.0)
    more = {"qwen2": dict(use_sliding_window=True, max_window_layers=1), "mistral": {}}[model_type]
    config: Any = transformers.AutoConfig.for_model(model_type, **settings, **more)
    model: Any = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    seen: list[tuple[Any, Any]] = []

    def see(layer, arguments, options, result):
        seen.append((options["hidden_states"], result[0]))
        options["hidden_states"].retain_grad()

    for layer in model.layers:
        layer.self_attn.register_forward_hook(see, with_kwargs=True)
        torch.nn.init.normal_(layer.self_attn.q_proj.weight)
    model(torch.arange(11)[None] % 7)
    for number, (x, expected) in enumerate(seen):
        theirs = model.layers[number].self_attn
        module, _ = hf_attention.attention_of(config.to_dict(), number)
        params = torch_interop.from_state_dict(theirs.state_dict(), heads=6, kv_heads=2)
        cotangent = torch.randn_like(expected)
        x_gradient, q_gradient = torch.autograd.grad(
            expected, (x, theirs.q_proj.weight), cotangent, retain_graph=True, allow_unused=False
        )

        def loss(params, x, module=module, cotangent=cotangent):
            out = module.apply({"params": params}, x, deterministic=True)[0]
            return jnp.sum(out * cotangent.numpy()), out

        gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x.detach().numpy())
        np.testing.assert_allclose(out, expected.detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(gradients[1], x_gradient.numpy(), atol=1e-4)
        np.testing.assert_allclose(gradients[0]["query"]["kernel"].reshape(24, -1).T, q_gradient.numpy(), atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("heads", [8, 71])
def test_falcons_alibi(heads):
    """Where positions and products are no longer whole in bfloat16. XLA divides by a constant to within one bit."""
    import torch
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 3001, dtype=torch.int64), heads, torch.float32) / math.sqrt(80)
    ours = jax.jit(falcon_alibi, static_argnums=(0, 1, 2))(heads, 80, 3001)
    np.testing.assert_array_max_ulp(np.asarray(ours), theirs.reshape(heads, 1, -1).numpy(), maxulp=1)


def test_rope_in_both_spellings():
    old = dict(rope_theta=500.0, rope_scaling=dict(type="linear", factor=4.0))
    new = dict(rope_parameters=dict(rope_theta=500.0, rope_type="linear", factor=4.0))
    expected = mqa_jax.Rope(theta=500.0, scaling=mqa_jax.LinearScaling(factor=4.0))
    assert hf_attention.rope_of(old) == hf_attention.rope_of(new) == expected
    assert hf_attention.rope_of({}) == mqa_jax.Rope(theta=10_000.0)
