"""The arguments of a module's call, what modules say, and FlashAttention's two."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_modules import RNG, X, _parts, run, shapes

import mqa_jax

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare


# -- arguments of a call -----------------------------------------------------------------------------------------------


def test_masks_of_each_rank_and_their_other_name():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2)
    params = module.init(RNG, X)["params"]
    keys = jnp.array([[1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]], bool)
    forms = [keys, keys[:, None], jnp.broadcast_to(keys[:, None], (2, 7, 7)), keys[:, None, None]]
    outputs = [run(module, params=params, mask=mask)[0] for mask in forms]
    outputs.append(run(module, params=params, attention_mask=keys)[0])
    for out in outputs[1:]:
        np.testing.assert_allclose(out, outputs[0], atol=1e-6)
    assert np.abs(outputs[0] - run(module, params=params)[0]).max() > 1e-3


def test_of_a_longer_bias_the_last_rows_and_columns_count():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2)
    params = module.init(RNG, X)["params"]
    bias = jax.random.normal(RNG, (1, 6, 10, 12))
    np.testing.assert_array_equal(
        run(module, params=params, bias=bias)[0], run(module, params=params, bias=bias[..., 3:, 5:])[0]
    )


def test_causal_of_the_call_comes_before_that_of_the_module():
    module = mqa_jax.GroupedQueryAttention(24, 6, causal=True)
    other = mqa_jax.GroupedQueryAttention(24, 6, causal=False)
    params = module.init(RNG, X)["params"]
    np.testing.assert_array_equal(run(module, params=params, causal=False)[0], run(other, params=params)[0])
    np.testing.assert_array_equal(run(module, params=params)[0], run(other, params=params, causal=True)[0])


def test_needs_weights():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2)
    params = module.init(RNG, X)["params"]
    out, weights, past = run(module, params=params, needs_weights=True)
    assert past is None
    assert weights.shape == (2, 6, 7, 7)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)
    assert not np.triu(weights[0, 0], 1).any()
    plain = run(module, params=params)
    np.testing.assert_allclose(out, plain[0], atol=1e-5)
    assert plain[1:] == (None, None)


def test_cross_attention():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, causal=False)
    context = jax.random.normal(RNG, (2, 5, 10))
    flax = nn.MultiHeadDotProductAttention(num_heads=6)
    mha = mqa_jax.MultiHeadAttention(24, 6, causal=False)
    params = flax.init(RNG, X, context)["params"]
    expected = run(flax, X, context, params=params)
    np.testing.assert_allclose(run(mha, X, params=params, inputs_k=context)[0], expected, atol=1e-5)
    values = jax.random.normal(RNG, (2, 5, 3))
    params = module.init(RNG, X, inputs_k=context, inputs_v=values)["params"]
    assert shapes(params["value"]["kernel"]) == (3, 2, 4)


def test_keys_of_an_earlier_layer():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2)
    params = module.init(RNG, X)["params"]
    _, key, value = _parts(params)
    reuse = {name: params[name] for name in ("query", "out")}
    out = run(module, params=reuse, prev_layer_key_value=(key, value))[0]
    np.testing.assert_allclose(out, run(module, params=params)[0], atol=1e-6)
    last = run(module, X[:, -3:], params=reuse, prev_layer_key_value=(key, value))[0]
    np.testing.assert_allclose(last, out[:, -3:], atol=1e-6)


def test_past_key_value_goes_on_from_call_to_call():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, rope=mqa_jax.Rope())
    params = module.init(RNG, X)["params"]
    outputs = []
    past: Any = ()
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        out, _, past = run(module, X[:, start:stop], past, params=params)
        outputs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), run(module, params=params)[0], atol=1e-5)
    assert past[0].shape == (2, 7, 2, 4)


def test_packed_sequences():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2)
    params = module.init(RNG, X)["params"]
    packed = run(module, params=params, segment_ids=jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2))[0]
    alone = [run(module, part, params=params)[0] for part in (X[:, :3], X[:, 3:])]
    np.testing.assert_allclose(packed, jnp.concatenate(alone, 1), atol=1e-5)


def test_padding():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, causal=False)
    params = module.init(RNG, X)["params"]
    padded = run(module, X.at[0, 4:].set(jnp.nan), params=params, seq_lengths=jnp.array([4, 7]))[0]
    np.testing.assert_allclose(padded[0, :4], run(module, X[:1, :4], params=params)[0][0], atol=1e-5)
    np.testing.assert_allclose(padded[1], run(module, X[1:], params=params)[0][0], atol=1e-5)


def test_positions_of_a_call():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, rope=mqa_jax.Rope())
    params = module.init(RNG, X)["params"]
    moved = run(module, params=params, positions=jnp.arange(7) + 100)[0]
    np.testing.assert_allclose(moved, run(module, params=params)[0], atol=1e-4)  # RoPE is relative
    stretched = run(module, params=params, positions=2 * jnp.arange(7))[0]
    assert np.abs(stretched - moved).max() > 1e-3


def test_dropout():
    module = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, attn_pdrop=0.5)
    params = module.init(RNG, X, deterministic=True)["params"]
    drop = lambda seed: module.apply(
        {"params": params}, X, deterministic=False, rngs={"dropout": jax.random.key(seed)}
    )[0]
    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.abs(drop(0) - drop(1)).max() > 1e-3
    plain = run(mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2), params=params)[0]
    np.testing.assert_array_equal(run(module, params=params, deterministic=True)[0], plain)
    always = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, attn_pdrop=0.5, deterministic=True)
    np.testing.assert_array_equal(run(always, params=params)[0], plain)


# -- what they say -----------------------------------------------------------------------------------------------------


def test_verbose(capsys):
    run(mqa_jax.MultiQueryAttention(24, 6, verbose=1))
    said = capsys.readouterr().err
    assert "MultiQueryAttention" in said
    assert "x.shape=(2, 7, 24)" in said
    assert "kv_heads=1" in said
    run(mqa_jax.MultiQueryAttention(24, 6))
    assert capsys.readouterr() == ("", "")


def test_device_is_explained():
    with pytest.warns(UserWarning, match="device='cuda' has no effect.*jax.device_put") as warned:
        mqa_jax.MultiQueryAttention(24, 6, device="cuda").init(RNG, X)
    assert len(warned) == 1


# -- FlashAttention and FlashMHA ---------------------------------------------------------------------------------------


def test_flash_attention():
    q, k, v = (jax.random.normal(key, (2, 6, n, 8)) for key, n in zip(jax.random.split(RNG, 3), (4, 7, 7)))
    swap = lambda x: jnp.swapaxes(x, 1, 2)
    bias, mask = jax.random.normal(RNG, (2, 6, 4, 7)), jax.random.bernoulli(RNG, 0.8, (2, 1, 4, 7))
    attend: Any = lambda **settings: lambda *a, **o: mqa_jax.FlashAttention(**settings).apply({}, q, k, v, *a, **o)
    expected = lambda **o: swap(mqa_jax.dot_product_attention(swap(q), swap(k), swap(v), **o))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
    close(attend()(mask, bias), expected(mask=mask, bias=bias))
    close(attend(causal=True)(mask, bias), expected(mask=mask, bias=bias, is_causal=True, query_offset=3))
    close(attend(flash=False, causal=True)(), expected(is_causal=True, query_offset=3))
    close(attend()(jnp.where(mask, 0.0, -1e9), bias), expected(bias=bias + jnp.where(mask, 0.0, -1e9)))
    shared = mqa_jax.FlashAttention().apply({}, q, k[:, 0], v[:, 0])
    close(shared, swap(mqa_jax.dot_product_attention(swap(q), swap(k[:, :1]), swap(v[:, :1]))))
    dropped = attend(dropout=0.5)(deterministic=False, rngs={"dropout": RNG})
    assert np.abs(dropped - attend()()).max() > 1e-3
    close(attend(dropout=0.5)(deterministic=True), attend()())


def test_flash_mha():
    module = mqa_jax.FlashMHA(24, 6, causal=True)
    params = module.init(RNG, X)["params"]
    out = module.apply({"params": params}, X, X, X)
    assert isinstance(out, jax.Array)
    np.testing.assert_array_equal(out, run(mqa_jax.MultiHeadAttention(24, 6), params=params)[0])
    np.testing.assert_array_equal(out, module.apply({"params": params}, X))
    half = mqa_jax.FlashMHA(24, 6, dtype=jnp.bfloat16).init(RNG, X.astype(jnp.bfloat16))["params"]
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
