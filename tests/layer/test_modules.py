"""The Flax modules: parameters, options, and what they compute, against `flax.linen` or written out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mqa_jax

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare
RNG = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 7, 24))


def run(module, *arguments, rngs=RNG, params=None, **options):
    """Output of a module with fresh parameters, or those given."""
    arguments = arguments or (X,)
    if params is None:
        params = module.init(rngs, *arguments, **options)["params"]
    with jax.numpy_rank_promotion("raise"):  # as careful users set it; the tests themselves promote
        return module.apply({"params": params}, *arguments, **options)


def shapes(params):
    return jax.tree.map(jnp.shape, params)


def random_like(params):
    """Parameters of which none is zero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return jax.tree.unflatten(structure, [jax.random.normal(key, leaf.shape) / 3 for key, leaf in zip(keys, leaves)])


# -- parameters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "kv_heads"),
    [
        (mqa_jax.MultiQueryAttention(24, 6), 1),
        (mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2), 2),
        (mqa_jax.GroupedQueryAttention(24, 6), 6),
        (mqa_jax.MultiHeadAttention(24, 6), 6),
    ],
)
def test_they_differ_by_kv_heads_alone(module, kv_heads):
    params = module.init(RNG, X)["params"]
    projection = lambda heads: {"kernel": (24, heads, 4), "bias": (heads, 4)}
    assert shapes(params) == {
        "query": projection(6),
        "key": projection(kv_heads),
        "value": projection(kv_heads),
        "out": {"kernel": (6, 4, 24), "bias": (24,)},
    }
    same = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=kv_heads)
    np.testing.assert_array_equal(run(module, params=params)[0], run(same, params=params)[0])


def test_parameters_are_those_of_flax_and_so_is_the_result():
    flax = nn.MultiHeadDotProductAttention(num_heads=6)
    ours = mqa_jax.MultiHeadAttention(24, 6, causal=False)
    params = random_like(flax.init(RNG, X)["params"])
    assert shapes(params) == shapes(ours.init(RNG, X)["params"])
    np.testing.assert_allclose(run(ours, params=params)[0], run(flax, params=params), atol=1e-5)


def test_the_initialisation_is_that_of_flax():
    """Same initialisers: the variance of each kernel, zero biases."""
    flax = nn.MultiHeadDotProductAttention(num_heads=6).init(RNG, X)["params"]
    ours = mqa_jax.MultiHeadAttention(24, 6).init(RNG, X)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.std(), b.std(), rtol=0.25), ours, flax)


def test_initializers_of_the_output_projection():
    value = nn.initializers.constant
    own: dict[str, Any] = dict(out_kernel_init=value(3.0), out_bias_init=value(4.0))
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, kernel_init=value(1.0), bias_init=value(2.0), **own)
    params = module.init(RNG, X)["params"]
    values = {name: {each: set(np.ravel(x).tolist()) for each, x in layer.items()} for name, layer in params.items()}
    others = {name: {"kernel": {1.0}, "bias": {2.0}} for name in ("query", "key", "value")}
    assert values == {**others, "out": {"kernel": {3.0}, "bias": {4.0}}}


def test_d_model_is_dim():
    by_position, by_alias = mqa_jax.MultiQueryAttention(24, 6), mqa_jax.MultiQueryAttention(d_model=24, heads=6)
    np.testing.assert_array_equal(run(by_position)[0], run(by_alias)[0])
    assert by_alias.dim == 24


def test_head_dim_and_out_features():
    module = mqa_jax.GroupedQueryAttention(24, 5, kv_heads=1, head_dim=6, out_features=10)
    assert run(module)[0].shape == (2, 7, 10)
    assert module.init(RNG, X)["params"]["query"]["kernel"].shape == (24, 5, 6)


def test_attention_has_one_head_and_no_output_projection():
    module = mqa_jax.Attention(24, head_dim=5)
    params = random_like(module.init(RNG, X)["params"])
    assert set(params) == {"query", "key", "value"}
    query, key, value = (X @ params[n]["kernel"][:, 0] + params[n]["bias"][0] for n in ("query", "key", "value"))
    expected = jax.nn.softmax(query @ key.swapaxes(1, 2) / np.sqrt(5)) @ value
    np.testing.assert_allclose(run(module, params=params)[0], expected, atol=1e-5)


def test_biases():
    params = mqa_jax.MultiQueryAttention(24, 6, use_bias=False).init(RNG, X)["params"]
    assert all(set(layer) == {"kernel"} for layer in params.values())
    params = mqa_jax.MultiQueryAttention(24, 6, use_bias=False, use_out_bias=True).init(RNG, X)["params"]
    assert "bias" in params["out"]
    assert "bias" not in params["query"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, dtype=dtype, param_dtype=jnp.float32)
    params = module.init(RNG, X)["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = run(module, params=params)[0]
    assert out.dtype == dtype
    exact = run(mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2), params=params)[0]
    np.testing.assert_allclose(np.float32(out), exact, atol=0.05)


@pytest.mark.parametrize("axes", [(), (2,), (2, 3)])
def test_any_number_of_leading_axes(axes):
    x = jax.random.normal(RNG, (*axes, 7, 24))
    module = mqa_jax.MultiQueryAttention(24, 6)
    params = module.init(RNG, x)["params"]
    flat = run(module, x.reshape(-1, 7, 24), params=params)[0]
    np.testing.assert_allclose(run(module, x, params=params)[0], flat.reshape(x.shape), atol=1e-5)


# -- options, each against what it is said to do -----------------------------------------------------------------------


def _parts(params, x=X):
    """Queries, keys and values as the module projects them."""
    return [jnp.einsum("btd,dnh->btnh", x, params[n]["kernel"]) + params[n]["bias"] for n in ("query", "key", "value")]


def _finish(params, out):
    return jnp.einsum("btnh,nhd->btd", out, params["out"]["kernel"]) + params["out"]["bias"]


def _check(settings, change, **options):
    """A module with these settings equals its parts with `change(query, key, value)` before attention."""
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, **settings)
    params = random_like(module.init(RNG, X)["params"])
    query, key, value = change(params, *_parts(params))
    out = mqa_jax.dot_product_attention(query, key, value, **{"is_causal": True, **options})
    np.testing.assert_allclose(run(module, params=params)[0], _finish(params, out), atol=2e-5)


def test_clip_qkv():
    _check(dict(clip_qkv=0.3), lambda params, *qkv: [jnp.clip(x, -0.3, 0.3) for x in qkv])
    _check(dict(clip_qkv=0.0), lambda params, *qkv: qkv)  # 0 is off, as upstream


def _normed(x, layer, rms):
    mean = 0.0 if rms else x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5) * layer["scale"] + layer.get("bias", 0.0)


@pytest.mark.parametrize("norm_type", ["layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm"])
@pytest.mark.parametrize("setting", ["qk_ln", "qk_gn"])
def test_norms(setting, norm_type):
    rms = norm_type.endswith("rmsnorm")

    def change(params, query, key, value):
        whole = lambda x: x if setting == "qk_gn" else x.reshape(*x.shape[:2], -1)
        norm = lambda x, name: _normed(whole(x), params[name], rms).reshape(x.shape)
        assert ("bias" in params["q_ln"]) == (not rms)
        return norm(query, "q_ln"), norm(key, "k_ln"), value

    _check({setting: True, "norm_type": norm_type}, change)


def test_rope():
    rope = mqa_jax.Rope(theta=100.0)
    positions = jnp.arange(7)
    _check(dict(rope=rope), lambda params, q, k, v: (rope(q, positions), rope(k, positions), v))


def test_alibi():
    _check(dict(alibi=True), lambda params, *qkv: qkv, alibi_slopes=mqa_jax.alibi_slopes(6))
    slopes = mqa_jax.alibi_slopes(6, 4)
    _check(dict(alibi=True, alibi_bias_max=4), lambda params, *qkv: qkv, alibi_slopes=slopes)


def test_attention_options():
    plain = lambda params, *qkv: qkv
    _check(dict(softmax_scale=0.1), plain, scale=0.1)
    _check(dict(local_window_size=2), plain, local_window_size=2)
    _check(dict(logits_soft_cap=0.5), plain, logits_soft_cap=0.5)
    _check(dict(causal=False), plain, is_causal=False)


def test_temperature_tuning():
    tuning = mqa_jax.TemperatureTuning(attn_scale=0.5, floor_scale=3)
    scale = 1 + 0.5 * np.log(np.floor((np.arange(7) + 1) / 3) + 1)
    _check(dict(attn_temperature_tuning=tuning), lambda params, q, k, v: (q * jnp.float32(scale)[:, None, None], k, v))


def test_sinks_and_a_zero_key():
    def attend(sinks):
        return lambda params: mqa_jax.dot_product_attention(*_parts(params), is_causal=True, sinks=sinks(params))

    cases: dict[str, Any] = {
        "sinks": (dict(sinks=True), attend(lambda params: params["sinks"])),
        "zero": (dict(add_zero_attn=True), attend(lambda params: jnp.zeros(6))),
        "both": (
            dict(sinks=True, add_zero_attn=True),
            attend(lambda params: jnp.log(jnp.exp(params["sinks"]) + 1)),
        ),
    }
    for settings, expected in cases.values():
        module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, **settings)
        params = random_like(module.init(RNG, X)["params"])
        np.testing.assert_allclose(run(module, params=params)[0], _finish(params, expected(params)), atol=2e-5)


def test_a_learned_key_and_value():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, causal=False, add_bias_kv=True)
    params = random_like(module.init(RNG, X)["params"])
    query, key, value = _parts(params)
    append = lambda x, name: jnp.concatenate([x, jnp.broadcast_to(params[name], (2, 1, 2, 4))], axis=1)
    out = mqa_jax.dot_product_attention(query, append(key, "bias_k"), append(value, "bias_v"))
    np.testing.assert_allclose(run(module, params=params)[0], _finish(params, out), atol=2e-5)
