"""The `cache` collection: cached decoding equals the full pass, for every option."""

from typing import Any

import chex
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import LENGTH, MAX_LENGTH, RNG, X, close, full_pass, make, new_cache, run, step
from hypothesis import strategies as st

import mqa_jax

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not causal": dict(causal=False),
    "rope": dict(rope=mqa_jax.Rope()),
    "interleaved rope": dict(rope=mqa_jax.Rope(interleaved=True, scaling=mqa_jax.Llama3Scaling())),
    "alibi": dict(alibi=True),
    "window": dict(local_window_size=(3, 0), rope=mqa_jax.Rope()),
    "soft cap": dict(logits_soft_cap=1.0),
    "scale": dict(softmax_scale=0.2),
    "sinks": dict(sinks=True),
    "clip and norm": dict(clip_qkv=1.0, qk_ln=True),
    "head norm": dict(qk_gn=True, norm_type="rmsnorm", rope=mqa_jax.Rope()),
    "temperature": dict(attn_temperature_tuning=mqa_jax.TemperatureTuning(floor_scale=2.0)),
    "learned key": dict(add_bias_kv=True, kv_heads=6),
    "zero key": dict(add_zero_attn=True),
    "reference": dict(attn_impl="reference", rope=mqa_jax.Rope()),
}


# -- cached decoding equals the full pass ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name):
    """A prompt in two chunks, then one and several tokens at a time."""
    module, params = make(**OPTIONS[name])
    full = full_pass(module, params, X)
    if not OPTIONS[name].get("causal", True):  # then what comes later changes what was before: the last chunk counts
        out, _ = run(module, params, (5, 6))
        return close(out[:, 5:], full[:, 5:])
    out, cache = run(module, params, (4, 1, 1, 1, 4))
    close(out, full)
    np.testing.assert_array_equal(cache["cache_index"], LENGTH)


@pytest.mark.parametrize("kind", ["MultiQueryAttention", "MultiHeadAttention", "Attention"])
def test_every_class(kind):
    module = getattr(mqa_jax, kind)(24, **({} if kind == "Attention" else {"heads": 6}), causal=True)
    params = module.init(RNG, X)["params"]
    out, _ = run(module, params, (7, 1, 3))
    close(out, full_pass(module, params, X))


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=25)
def test_any_schedule_of_chunks_steps_resets_and_reorderings(data):
    """Rows are independent: each is compared with the full pass over the tokens it holds."""
    module, params = make(rope=mqa_jax.Rope(), local_window_size=(6, 0))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    cache, texts = new_cache(module), [np.zeros((0, 24), np.float32)] * 3
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["tokens", "tokens", "reset", "reorder"]))
        if action == "reset":
            rows = rng.random(3) < 0.5
            cache = mqa_jax.reset_cache(cache, rows)
            texts = [text[:0] if reset else text for text, reset in zip(texts, rows)]
        elif action == "reorder":
            order = rng.integers(0, 3, 3)
            cache = mqa_jax.reorder_cache(cache, order)
            texts = [texts[row] for row in order]
        else:
            length = data.draw(st.sampled_from([1, 4]))
            lengths = np.minimum(rng.integers(0, length + 1, 3), [MAX_LENGTH - len(text) for text in texts])
            new = rng.standard_normal((3, length, 24)).astype(np.float32)
            out, cache = step(module, params, cache, jnp.asarray(new), seq_lengths=jnp.asarray(lengths))
            for row, count in enumerate(lengths):
                texts[row] = np.concatenate([texts[row], new[row, :count]])
                padded = np.zeros((1, MAX_LENGTH, 24), np.float32)
                padded[0, : len(texts[row])] = texts[row]
                full = full_pass(module, params, padded)[0, : len(texts[row])]
                close(out[row, :count], full[len(full) - count :])
    np.testing.assert_array_equal(cache["cache_index"], [len(text) for text in texts])


def test_rows_at_different_positions():
    """Prompts of different lengths, padded, and what comes next behind each."""
    module, params = make(rope=mqa_jax.Rope(), alibi=True)
    lengths = jnp.array([5, 2, 0])
    prompt, cache = step(module, params, new_cache(module), X[:, :5], seq_lengths=lengths)
    following, cache = step(module, params, cache, X[:, 5:7])
    for row, length in enumerate([5, 2, 0]):
        text = jnp.concatenate([X[row, :length], X[row, 5:7]])[None]
        full = module.apply({"params": params}, text)[0][0]
        close(prompt[row, :length], full[:length])
        close(following[row], full[length:])
    np.testing.assert_array_equal(cache["cache_index"], lengths + 2)


def test_padding_that_overhangs_the_end_overwrites_nothing():
    module, params = make(rope=mqa_jax.Rope())
    cache = new_cache(module, max_length=9)
    _, cache = step(module, params, cache, X[:, :7])
    out, cache = step(module, params, cache, X[:, 7:], seq_lengths=jnp.array([2, 1, 0]))
    full = full_pass(module, params, X)
    close(out[0, :2], full[0, 7:9])
    close(out[1, :1], full[1, 7:8])
    again, _ = step(module, params, cache, X[1:2, 8:9].repeat(3, 0), seq_lengths=jnp.array([0, 1, 0]))
    close(again[1, 0], full[1, 8])


@pytest.mark.parametrize("axis", ["mask", "bias"])
def test_mask_and_bias_span_the_whole_cache(axis):
    module, params = make()
    pairs = jax.random.normal(RNG, (3, 1, LENGTH, MAX_LENGTH))
    pairs = pairs > 0 if axis == "mask" else pairs
    full = module.apply({"params": params}, X, **{axis: pairs[..., :LENGTH]})[0]
    _, cache = step(module, params, new_cache(module), X[:, :8], **{axis: pairs[:, :, :8]})
    out, _ = step(module, params, cache, X[:, 8:], **{axis: pairs[:, :, 8:]})
    close(out, full[:, 8:])


def test_weights_of_a_cached_call():
    module, params = make()
    _, cache = step(module, params, new_cache(module), X[:, :8])
    variables = {"params": params, "cache": cache}
    (_, weights, _), _ = module.apply(variables, X[:, 8:], needs_weights=True, mutable=["cache"])
    full = module.apply({"params": params}, X, needs_weights=True)[1]
    close(weights[..., :LENGTH], full[:, :, 8:])
    assert not weights[..., LENGTH:].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrower_cache(dtype):
    module, params = make(rope=mqa_jax.Rope())
    cache = new_cache(module, dtype=dtype)
    assert cache["cached_key"].dtype == dtype
    out, cache = run(module, params, (5, 1, 5), cache=cache)
    full = full_pass(module, params, X)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, full, atol=30 * float(jnp.finfo(dtype).eps))
    assert mqa_jax.cache_bytes(cache) == 2 * 3 * MAX_LENGTH * 2 * 4 * 2


def test_dropout_of_a_cached_call():
    module, params = make(attn_pdrop=0.5, deterministic=True)
    out, _ = run(module, params, (5, 6))
    close(out, full_pass(module, params, X))


# -- creating, reordering, resetting -----------------------------------------------------------------------------------
RAN: list[int] = []  # a number for each time that Model ran


class Model(nn.Module):
    """Attention inside other modules, rematerialised or not."""

    @nn.compact
    def __call__(self, x):
        jax.debug.callback(lambda: RAN.append(1))
        for i in range(2):
            x = x + nn.remat(mqa_jax.GroupedQueryAttention)(24, 6, kv_heads=2, rope=mqa_jax.Rope(), name=f"a_{i}")(x)[0]
        return nn.Dense(5)(x)


@pytest.mark.linen
def test_a_cache_for_a_whole_model_without_running_it():
    model = Model()
    params = model.init(RNG, X)["params"]
    jax.effects_barrier()
    RAN.clear()
    cache = mqa_jax.init_cache(model, 3, MAX_LENGTH, jax.ShapeDtypeStruct((3, 1, 24), jnp.float32))
    jax.effects_barrier()
    assert not RAN
    assert set(cache) == {"a_0", "a_1"}
    assert cache["a_0"]["cached_key"].shape == (3, MAX_LENGTH, 2, 4)
    assert not any(x.any() for x in jax.tree.leaves(cache))
    apply = lambda cache, x: model.apply({"params": params, "cache": cache}, x, mutable=["cache"])
    first, changed = apply(cache, X[:, :6])
    second, _ = apply(changed["cache"], X[:, 6:])
    close(jnp.concatenate([first, second], 1), model.apply({"params": params}, X))
    jax.effects_barrier()
    assert len(RAN) == 3


@pytest.mark.linen
def test_a_cache_of_a_module_under_jit_is_that_which_was_asked_for():
    """Flax traces such a module once for arguments of the same shapes."""
    module = nn.jit(mqa_jax.GroupedQueryAttention)(24, 6)
    for length, dtype in ((8, None), (32, "int8"), (32, jnp.bfloat16)):
        cache = mqa_jax.init_cache(module, 1, length, X[:1], dtype=dtype)
        assert cache["cached_key"].shape[1] == length
        assert cache["cached_key"].dtype == (dtype or jnp.float32)


@pytest.mark.linen
def test_init_cache_of_one_module():
    module, params = make()
    cache = module.init_cache(3, MAX_LENGTH, jnp.bfloat16)
    chex.assert_trees_all_equal(cache, new_cache(module, dtype=jnp.bfloat16))
    _, changed = module.apply({"params": params}, 3, MAX_LENGTH, method="init_cache", mutable=["cache"])
    chex.assert_trees_all_equal(changed["cache"], new_cache(module))


def test_without_a_cache_collection_nothing_is_stored():
    module, params = make()
    assert set(module.init(RNG, X)) == {"params"}
    _, changed = module.apply({"params": params}, X, mutable=["cache"])
    assert not changed.get("cache")


def test_what_a_reset_row_held_is_not_seen_even_if_it_was_nan():
    module, params = make(rope=mqa_jax.Rope())
    _, cache = step(module, params, new_cache(module), X[:, :6].at[1].set(jnp.nan))
    cache = mqa_jax.reset_cache(cache, np.array([False, True, False]))
    out, _ = step(module, params, cache, X[:, :4])
    close(out[1], module.apply({"params": params}, X[1:2, :4])[0][0])


def test_bytes_of_mqa_gqa_and_mha():
    sizes = [mqa_jax.cache_bytes(new_cache(mqa_jax.GroupedQueryAttention(24, 6, kv_heads=n))) for n in (1, 2, 6)]
    assert sizes == [sizes[0], 2 * sizes[0], 6 * sizes[0]]
