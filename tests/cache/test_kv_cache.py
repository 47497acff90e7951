"""The `cache` collection: cached decoding equals the full pass, for every option and every way of running it."""

import dataclasses
import functools
from typing import Any

import chex
import flax.core
import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import LENGTH, MAX_LENGTH, RNG, X, close, eager_step, full_pass, make, new_cache, run, step
from hypothesis import strategies as st
from jax import export
from jax.experimental import checkify

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


# -- cached decoding equals the full pass -----------------------------------------------------------------------------


@pytest.mark.sampled(2)
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


# -- creating, reordering, resetting ----------------------------------------------------------------------------------


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


# -- a full cache -----------------------------------------------------------------------------------------------------


def _nearly_full(length=9):
    """Row 1 has no room for two more tokens."""
    module, params = make()
    cache = new_cache(module, max_length=length)
    _, cache = step(module, params, cache, X[:, : length - 1], seq_lengths=jnp.array([4, length - 1, 6]))
    return module, params, cache


def test_overflow_raises_at_once_outside_jit():
    module, params, cache = _nearly_full()
    with pytest.raises(ValueError, match=r"cache is full: cache_index=\[ 6 10  8\].*max_length=9"):
        eager_step(module, params, cache, X[:, :2])


def test_overflow_under_jit_is_nan_in_that_row_and_changes_no_other():
    module, params, cache = _nearly_full()
    out, changed = step(module, params, cache, X[:, :2])
    assert jnp.isnan(out[1]).all()
    room = jax.tree.map(lambda x: x[:: len(x) - 1], cache)  # rows 0 and 2
    close(out[::2], step(module, params, room, X[::2, :2])[0])
    np.testing.assert_array_equal(changed["cached_key"][1], cache["cached_key"][1])
    out, _ = step(module, params, changed, X[:, :1])
    assert jnp.isnan(out[1]).all()  # and stays so, until the row is reset
    assert not jnp.isnan(out[0]).any()


def test_checkify_sees_an_overflow():
    module, params, cache = _nearly_full()
    checked = jax.jit(checkify.checkify(functools.partial(eager_step, module)))
    error, _ = checked(params, cache, X[:, :2])
    assert "cache_index=10 after this call, max_length=9" in error.get()
    error, _ = checked(params, cache, X[:, :1])
    assert error.get() is None


def test_check_cache():
    module, params, cache = _nearly_full()
    mqa_jax.check_cache({"layer": cache})
    _, full = step(module, params, cache, X[:, :2])
    with pytest.raises(ValueError, match="cache is full"):
        mqa_jax.check_cache({"layer": full})
    error, _ = jax.jit(checkify.checkify(mqa_jax.check_cache))({"layer": full})
    assert "max_length=9" in error.get()


# -- under JAX's transformations --------------------------------------------------------------------------------------


def test_steps_do_not_retrace():
    chex.clear_trace_counter()  # which counts by the hash of a function, so that one takes over the count of another
    module, params = make(rope=mqa_jax.Rope(), local_window_size=4)

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(chex.assert_max_traces, n=1)
    def traced(cache, x):
        return eager_step(module, params, cache, x)

    cache = new_cache(module)
    for position in range(LENGTH):
        _, cache = traced(cache, X[:, position : position + 1])


def test_the_donated_cache_is_updated_in_place():
    """Buffers are reused, and the compiled program copies nothing of the size of the cache."""
    module, params = make()
    cache = new_cache(module, max_length=2**15)
    compiled = jax.jit(functools.partial(eager_step, module), donate_argnums=1).lower(params, cache, X[:, :1]).compile()
    pointer = cache["cached_key"].unsafe_buffer_pointer()
    _, changed = compiled(params, cache, X[:, :1])
    assert changed["cached_key"].unsafe_buffer_pointer() == pointer
    assert cache["cached_key"].is_deleted()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < changed["cached_key"].nbytes / 2


def test_scan_and_while_loop():
    module, params = make(rope=mqa_jax.Rope())
    full = full_pass(module, params, X)

    def turn(cache, token):
        out, cache = step(module, params, cache, token[:, None])
        return cache, out[:, 0]

    _, scanned = jax.lax.scan(turn, new_cache(module), X.swapaxes(0, 1))
    close(scanned.swapaxes(0, 1), full)

    def body(state):
        position, cache, outputs = state
        cache, out = turn(cache, X[:, position])
        return position + 1, cache, outputs.at[:, position].set(out)

    looped = jax.lax.while_loop(lambda s: s[0] < LENGTH, body, (jnp.int32(0), new_cache(module), jnp.zeros_like(X)))
    close(looped[2], full)


def test_vmap():
    """Over rows of a batch of one, each with a cache of its own."""
    module, params = make(rope=mqa_jax.Rope())
    caches = jax.tree.map(lambda x: jnp.stack([x] * 3), new_cache(module, batch=1))
    mapped = jax.vmap(functools.partial(step, module, params))
    first, caches = mapped(caches, X[:, None, :6])
    second, _ = mapped(caches, X[:, None, 6:])
    close(jnp.concatenate([first, second], 2)[:, 0], full_pass(module, params, X))


class Scanned(nn.Module):
    """Layers stacked by nn.scan: parameters and caches have a layer axis in front."""

    @nn.compact
    def __call__(self, x):
        def layer(module, x, _):
            return x + module(x)[0], None

        attention = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, rope=mqa_jax.Rope(), name="layers")
        scan = nn.scan(layer, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True}, length=4)
        return scan(attention, x, None)[0]


@pytest.mark.linen
def test_nn_scan_over_layers():
    model = Scanned()
    params = model.init(RNG, X)["params"]
    cache = mqa_jax.init_cache(model, 3, MAX_LENGTH, X)
    assert cache["layers"]["cached_key"].shape == (4, 3, MAX_LENGTH, 2, 4)
    apply = jax.jit(lambda cache, x: model.apply({"params": params, "cache": cache}, x, mutable=["cache"]))
    first, changed = apply(cache, X[:, :6])
    second, changed = apply(changed["cache"], X[:, 6:])
    full = model.apply({"params": params}, X)
    close(jnp.concatenate([first, second], 1), full)
    cache = mqa_jax.reset_cache(changed["cache"], np.array([False, True, False]), batch_axis=1)
    cache = mqa_jax.reorder_cache(cache, np.array([1, 1, 0]), batch_axis=-1)
    np.testing.assert_array_equal(cache["layers"]["cache_index"], [[0, 0, LENGTH]] * 4)
    close(apply(cache, X[:, :3])[0][0], model.apply({"params": params}, X[:1, :3])[0])


@pytest.mark.linen
def test_a_full_cache_inside_nn_scan_is_found_by_check_cache():
    model = Scanned()
    params = model.init(RNG, X)["params"]
    cache = mqa_jax.init_cache(model, 3, LENGTH - 1, X)
    apply = lambda cache, x: model.apply({"params": params, "cache": cache}, x, mutable=["cache"])
    out, changed = jax.jit(apply)(cache, X)
    assert jnp.isnan(out).all()
    with pytest.raises(ValueError, match="cache is full"):
        mqa_jax.check_cache(changed["cache"])


@pytest.mark.linen
def test_checkify_sees_an_overflow_inside_nn_scan():
    model = Scanned()
    params = model.init(RNG, X)["params"]
    cache = mqa_jax.init_cache(model, 3, LENGTH - 1, X)
    apply = lambda cache, x: model.apply({"params": params, "cache": cache}, x, mutable=["cache"])
    error, _ = jax.jit(checkify.checkify(apply))(cache, X)
    assert "cache_index=11 after this call, max_length=10" in error.get()


def test_a_cached_step_is_exported():
    """The check for `checkify` is no effect, of which JAX serialises none that has arguments."""
    module, params = make()
    cache = new_cache(module)
    blob = export.export(jax.jit(functools.partial(eager_step, module)))(params, cache, X[:, :5]).serialize()
    out, cache = export.deserialize(blob).call(params, cache, X[:, :5])
    close(out, full_pass(module, params, X[:, :5]))
    np.testing.assert_array_equal(cache["cache_index"], 5)


# -- arguments out of range where nothing can raise -------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("wrong", [5, -1])
def test_impossible_seq_lengths_under_jit_are_nan_until_the_row_is_reset(layout, wrong):
    module, params = make(cache_layout=layout, local_window_size=(6, 0), rope=mqa_jax.Rope())
    cache = new_cache(module)
    out, cache = step(module, params, cache, X[:, :4], seq_lengths=jnp.array([4, wrong, 3]))
    following, cache = step(module, params, cache, X[:, 4:6])
    for x in (out, following):
        np.testing.assert_array_equal(jnp.isnan(x).all((1, 2)), [False, True, False])
        assert not jnp.isnan(x[::2]).any()
    close(following[0], full_pass(module, params, X[:, :6])[0, 4:])
    with pytest.raises(ValueError, match=r"worthless: cache_index=\[ 6 -1  5\]"):
        mqa_jax.check_cache({"layer": cache})
    cache = mqa_jax.reset_cache(cache, np.array([False, True, False]))
    close(step(module, params, cache, X[:, :4])[0][1], full_pass(module, params, X[:, :4])[1])
    checked = jax.jit(checkify.checkify(functools.partial(eager_step, module)))
    error, _ = checked(params, new_cache(module), X[:, :4], seq_lengths=jnp.array([4, wrong, 3]))
    assert f"seq_lengths={wrong}, tokens=4" in error.get()


def test_impossible_seq_lengths_without_a_cache_are_nan_under_jit():
    module, params = make()
    out = full_pass(module, params, X, seq_lengths=jnp.array([LENGTH, LENGTH + 1, 3]))
    np.testing.assert_array_equal(jnp.isnan(out).all((1, 2)), [False, True, False])
    assert not jnp.isnan(out[::2]).any()
    error, _ = jax.jit(checkify.checkify(lambda n: module.apply({"params": params}, X, seq_lengths=n)))(
        jnp.array([1, 2, LENGTH + 1])
    )
    assert f"seq_lengths={LENGTH + 1}, tokens={LENGTH}" in error.get()


def test_weights_of_a_full_row_are_nan():
    module, params, cache = _nearly_full()
    attend = lambda cache: module.apply(
        {"params": params, "cache": cache}, X[:, :2], mutable=["cache"], needs_weights=True
    )
    weights = jax.jit(attend)(cache)[0][1]
    np.testing.assert_array_equal(jnp.isnan(weights).all((1, 2, 3)), [False, True, False])


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_a_row_from_outside_the_batch_is_nan_under_jit(dtype):
    module, params = make(cache_dtype=dtype)
    _, cache = step(module, params, new_cache(module), X[:, :4])
    reordered = jax.jit(mqa_jax.reorder_cache)(cache, jnp.array([2, 3, -1]))
    out, _ = step(module, params, reordered, X[jnp.array([2, 2, 2]), 4:5])
    np.testing.assert_array_equal(jnp.isnan(out).all((1, 2)), [False, True, True])
    close(out[0], step(module, params, cache, X[:, 4:5])[0][2])
    error, _ = jax.jit(checkify.checkify(mqa_jax.reorder_cache))(cache, jnp.array([2, 3, 1]))
    assert "rows of the cache, 0 to 2: rows=3" in error.get()


# -- collections of any form ------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    layers: list


@pytest.mark.parametrize("around", [lambda c: [c, c], lambda c: (flax.core.freeze({"a": c}),), lambda c: State([c])])
def test_caches_are_found_wherever_they_are(around):
    module, params, cache = _nearly_full()
    whole = around(cache)
    count = len(jax.tree.leaves(whole)) // 3
    assert mqa_jax.cache_bytes(whole) == count * mqa_jax.cache_bytes(cache)
    order, reset = np.array([1, 0, 2]), np.array([False, True, False])
    chex.assert_trees_all_equal(mqa_jax.reorder_cache(whole, order), around(mqa_jax.reorder_cache(cache, order)))
    chex.assert_trees_all_equal(mqa_jax.reset_cache(whole, reset), around(mqa_jax.reset_cache(cache, reset)))
    mqa_jax.check_cache(whole)
    _, full = step(module, params, cache, X[:, :2])
    with pytest.raises(ValueError, match="cache is full"):
        mqa_jax.check_cache(around(full))


@pytest.mark.linen
def test_layers_beside_stacked_layers():
    """Each keeps its own batch axis, and arrays of other modules go along."""
    first, cache = new_cache(make()[0]), mqa_jax.init_cache(Scanned(), 3, MAX_LENGTH, X)
    fill = lambda tree: jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape).astype(x.dtype), tree
    )
    mixed = fill({"first": first, **cache, "other": {"state": jnp.zeros((4, 3, 2))}})
    taken = mqa_jax.reorder_cache(mixed, np.array([2, 0, 0]), batch_axis=1)
    order = np.array([2, 0, 0])
    chex.assert_trees_all_equal(taken["first"], jax.tree.map(lambda x: x[order], mixed["first"]))
    for name in ("layers", "other"):
        chex.assert_trees_all_equal(taken[name], jax.tree.map(lambda x: x[:, order], mixed[name]))


# -- what a model may do with its modules -----------------------------------------------------------------------------


class Shared(nn.Module):
    """Two modules, each called twice a step, as ALBERT's layers are."""

    kind: str
    layout: str = "static"

    def setup(self):
        makers: dict[str, Any] = {"remat": nn.remat, "jit": nn.jit, "plain": lambda kind: kind}
        make = makers[self.kind](mqa_jax.GroupedQueryAttention)
        settings = dict(kv_heads=2, rope=mqa_jax.Rope(), cache_layout=self.layout, local_window_size=(6, 0))
        self.layers = [make(24, 6, **settings) for _ in range(2)]

    def __call__(self, x):
        for layer in (*self.layers, *self.layers, self.layers[0]):
            x = x + layer(x)[0]
        return x

    def two_steps(self, x):
        return jnp.concatenate([self(x[:, :1]), self(x[:, 1:])], 1)


@pytest.mark.linen
@pytest.mark.parametrize(("kind", "layout"), [("plain", "static"), ("remat", "ring"), ("jit", "static")])
def test_a_module_that_a_step_calls_several_times(kind, layout):
    model = Shared(kind, layout)
    params = model.init(RNG, X)["params"]
    cache = mqa_jax.init_cache(model, 3, MAX_LENGTH, X)
    assert [len(cache[f"layers_{i}"]["other_calls"]) for i in range(2)] == [2, 1]
    assert mqa_jax.cache_bytes(cache) == 5 * mqa_jax.cache_bytes(
        {k: v for k, v in cache["layers_0"].items() if k != "other_calls"}
    )
    apply = jax.jit(
        lambda cache, x, method=None: model.apply(
            {"params": params, "cache": cache}, x, mutable=["cache"], method=method
        ),
        static_argnames="method",
    )
    full = model.apply({"params": params}, X)
    first, state = apply(cache, X[:, :4])
    cache = mqa_jax.reorder_cache(state["cache"], np.array([1, 0, 2]))
    again, state = apply(cache, X[jnp.array([1, 0, 2]), 4:6], method="two_steps")
    last, _ = apply(mqa_jax.reorder_cache(state["cache"], np.array([1, 0, 2])), X[:, 6:])
    close(jnp.concatenate([first, again[jnp.array([1, 0, 2])], last], 1), full)


class Flags(nn.Module):
    """What models take beside arrays: flags, words, nothing, numbers that are shapes."""

    @nn.compact
    def __call__(self, x, train, mode, nothing=None, *, copies, flags):
        assert train is False
        assert (mode, nothing, copies, flags["deep"]) == ("greedy", None, 2, (True,))
        return jnp.concatenate([mqa_jax.GroupedQueryAttention(24, 6)(x)[0]] * copies)


@pytest.mark.linen
def test_what_is_no_array_reaches_the_model_as_it_is():
    x = jax.ShapeDtypeStruct((3, 2, 24), jnp.float32)
    cache = mqa_jax.init_cache(Flags(), 3, MAX_LENGTH, x, False, "greedy", None, copies=2, flags={"deep": (True,)})
    assert cache["GroupedQueryAttention_0"]["cached_key"].shape == (3, MAX_LENGTH, 6, 4)


@pytest.mark.linen
def test_cross_attention_gets_no_cache():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x, context):
            x = x + mqa_jax.GroupedQueryAttention(24, 6, name="own")(x)[0]
            return x + mqa_jax.GroupedQueryAttention(24, 6, causal=False, name="cross")(x, inputs_k=context)[0]

    context = X[:, :5, :10]
    params = Decoder().init(RNG, X, context)["params"]
    cache = mqa_jax.init_cache(Decoder(), 3, MAX_LENGTH, X, context)
    assert set(cache) == {"own"}
    apply = lambda cache, x: Decoder().apply({"params": params, "cache": cache}, x, context, mutable=["cache"])
    first, state = apply(cache, X[:, :6])
    second, _ = apply(state["cache"], X[:, 6:])
    close(jnp.concatenate([first, second], 1), Decoder().apply({"params": params}, X, context))


@pytest.mark.linen
def test_a_model_of_which_a_layer_has_no_cache_is_refused():
    model = Shared("plain")
    params = model.init(RNG, X)["params"]
    cache = mqa_jax.init_cache(model, 3, MAX_LENGTH, X)
    message = r"no cache for this module: path=\('layers_1',\), the collection has \['layers_0'\]"
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params, "cache": {"layers_0": cache["layers_0"]}}, X, mutable=["cache"])


@pytest.mark.linen
def test_a_bound_module_goes_on_from_call_to_call():
    module, params = make()
    bound = module.bind({"params": params, "cache": new_cache(module)}, mutable=["cache"])
    out = [bound(X[:, i : i + 2])[0] for i in (0, 2, 4)]
    close(jnp.concatenate(out, 1), full_pass(module, params, X[:, :6]))


def test_beam_search_finds_what_trying_everything_finds():
    """With as many beams as there are texts: the cache follows the rows as they are reordered."""
    vocabulary, length = 3, 3
    table = jax.random.normal(RNG, (vocabulary, 24))
    module, params = make(rope=mqa_jax.Rope())
    head = jax.random.normal(jax.random.key(7), (24, vocabulary)) * 3
    scores = lambda out: jax.nn.log_softmax(out @ head)
    texts = np.stack(np.meshgrid(*[np.arange(vocabulary)] * length, indexing="ij"), -1).reshape(-1, length)
    every = jnp.asarray(np.concatenate([np.zeros((len(texts), 1), int), texts], 1))
    logits = scores(module.apply({"params": params}, table[every[:, :-1]])[0])
    total = jnp.take_along_axis(logits, every[:, 1:, None], 2)[..., 0].sum(1)
    best = texts[int(total.argmax())]

    beams = vocabulary**2
    cache, rows, sums = new_cache(module, batch=beams), np.zeros((beams, 1), int), np.full(beams, -np.inf)
    sums[0] = 0.0
    for _ in range(length):
        out, cache = step(module, params, cache, table[rows[:, -1:]])
        candidates = sums[:, None] + np.asarray(scores(out[:, 0]))
        chosen = np.argsort(-candidates, axis=None)[:beams]
        beam, token = np.unravel_index(chosen, candidates.shape)
        cache, sums = mqa_jax.reorder_cache(cache, beam), candidates[beam, token]
        rows = np.concatenate([rows[beam], token[:, None]], 1)
    np.testing.assert_array_equal(rows[0, 1:], best)
    close(sums[0], total.max())
