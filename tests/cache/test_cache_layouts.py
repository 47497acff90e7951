"""Ring buffers and caches in 8 bits: what is cached is what was to be cached, and attention to it is exact."""

import functools
from typing import Any
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import RNG, X, close, eager_step, full_pass, make, new_cache, step
from hypothesis import strategies as st
from jax.experimental import checkify

import mqa_jax
from mqa_jax import quantization
from mqa_jax.cache import layout
from mqa_jax.layer import attention_layer

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare

WINDOW = (6, 0)
SLOTS = layout.ring_slots(WINDOW[0])
LENGTH = 3 * SLOTS + 5
TEXT = jax.random.normal(RNG, (3, LENGTH, 24))
EIGHT_BITS = "int8", "float8_e4m3fn"
RING: dict[str, Any] = dict(cache_layout="ring", local_window_size=WINDOW)

# Each with its arguments of a call, which span all positions.
OPTIONS: dict[str, dict[str, Any]] = {
    "positions": dict(rope=mqa_jax.Rope(), alibi=True, attn_temperature_tuning=mqa_jax.TemperatureTuning()),
    "scores": dict(qk_gn=True, logits_soft_cap=1.0, softmax_scale=0.4, sinks=True, add_zero_attn=True),
    "learned key": dict(add_bias_kv=True, kv_heads=6, clip_qkv=1.0),
    "one head": dict(kv_heads=1, local_window_size=(6, 2), causal=False),
}
PAIRS: dict[str, Any] = {
    "mask": jax.random.normal(RNG, (3, 1, LENGTH, LENGTH)) > -1,
    "mask of keys": jax.random.normal(RNG, (3, LENGTH)) > -1,
    "bias": jax.random.normal(RNG, (6, LENGTH, LENGTH)),
    "bias of keys": jax.random.normal(RNG, (3, 1, 1, LENGTH)),
    "bias of queries": jax.random.normal(RNG, (6, LENGTH, 1)),
}
SCHEDULE = (1, 20, 5, 1, 1, 37, 3, 1, 1, 1)  # within the ring and past it; over its end in both


def cached(module, params, schedule=SCHEDULE, cache=None, x=TEXT, arguments=lambda start, stop: {}):
    """Outputs of these chunks one after the other, and the last cache."""
    outputs, start = [], 0
    cache = new_cache(module, max_length=LENGTH) if cache is None else cache
    for length in schedule:
        more = arguments(start, start + length)
        out, cache = step(module, params, cache, x[:, start : start + length], **more)
        outputs.append(out)
        start += length
    return jnp.concatenate(outputs, 1), cache


def rows_of(name, start, stop):
    pairs = PAIRS[name]
    rows = pairs.shape[-2] if "of keys" not in name else 1
    return {name.split()[0]: pairs if rows == 1 else pairs[..., start:stop, :]}


# -- ring buffers -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_ring_computes_what_the_full_pass_does(name):
    settings = {**RING, **OPTIONS[name]}
    module, params = make(**settings)
    out, cache = cached(module, params)
    if not settings.get("causal", True):  # what comes later changes what was before, so each chunk is the end of a text
        chunks = np.cumsum(SCHEDULE)
        full = [full_pass(module, params, TEXT[:, :stop])[:, start:] for start, stop in zip([0, *chunks], chunks)]
        return close(out, jnp.concatenate(full, 1))
    close(out, full_pass(module, params, TEXT[:, : sum(SCHEDULE)]))
    np.testing.assert_array_equal(cache["ring_index"], sum(SCHEDULE))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", PAIRS)
def test_masks_and_biases_of_a_ring_are_by_position(name):
    module, params = make(**RING)
    schedule = (3, 20, 2, 1)
    out, _ = cached(module, params, schedule, arguments=functools.partial(rows_of, name))
    length = sum(schedule)
    cut = {key: x[..., :length] if x.shape[-1] > 1 else x for key, x in rows_of(name, 0, length).items()}
    close(out, full_pass(module, params, TEXT[:, :length], **cut))


TABLES: dict[str, Any] = {
    "mask": dict(mask=jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))),
    "mask of each row": dict(mask=PAIRS["mask"]),
    "bias": dict(bias=PAIRS["bias"]),
    "bias of queries": dict(bias=PAIRS["bias of queries"]),
    "both": dict(bias=PAIRS["bias"], mask=PAIRS["mask"]),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("name", TABLES)
def test_one_table_of_all_pairs_serves_every_call(name, layout):
    """Rows of the batch at different positions, in steps, chunks, and more than a ring takes at once."""
    module, params = make(cache_layout=layout, local_window_size=WINDOW, causal=name != "mask")
    lengths = np.array([7, 3, 0])
    cache = new_cache(module, max_length=LENGTH - 2)  # the table may be longer than the cache
    first, cache = step(module, params, cache, TEXT[:, :7], seq_lengths=jnp.asarray(lengths), **TABLES[name])
    following = jnp.stack([TEXT[row, n : n + 32] for row, n in enumerate(lengths)])
    out, _ = cached(module, params, (1, 5, 1, 23, 2), cache, following, lambda start, stop: TABLES[name])
    full = full_pass(module, params, TEXT, **TABLES[name])
    for row, n in enumerate(lengths):
        close(first[row, :n], full[row, :n])
        close(out[row], full[row, n : n + 32])


@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_a_table_that_ends_before_the_last_token_is_nan_under_jit(name, layout):
    module, params = make(cache_layout=layout, local_window_size=WINDOW)
    table = {name: TABLES[name][name][..., :6, :]}
    _, cache = step(module, params, new_cache(module, max_length=LENGTH), TEXT[:, :4], seq_lengths=jnp.array([4, 2, 4]))
    out, cache = step(module, params, cache, TEXT[:, 4:7], **table)
    np.testing.assert_array_equal(jnp.isnan(out).all((1, 2)), [True, False, True])
    assert not jnp.isnan(step(module, params, cache, TEXT[:, 7:8])[0]).any()  # the cache itself took the tokens
    error, _ = jax.jit(checkify.checkify(functools.partial(eager_step, module)))(params, cache, TEXT[:, 7:8], **table)
    assert "rows=6" in error.get()


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_hundreds_of_steps_past_the_end_of_a_ring(dtype):
    """One token at a time; in 8 bits beside a static cache."""
    module, params = make(rope=mqa_jax.Rope(theta=100.0), cache_dtype=dtype, **RING)
    static = module.clone(cache_layout="static")
    text = jax.random.normal(RNG, (2, 400, 24))

    @functools.partial(jax.jit, static_argnums=0)
    def scanned(module, cache):
        def turn(cache, token):
            out, cache = eager_step(module, params, cache, token[:, None])
            return cache, out[:, 0]

        return jax.lax.scan(turn, cache, text.swapaxes(0, 1))[1].swapaxes(0, 1)

    out = scanned(module, new_cache(module, 2, max_length=1))
    expected = full_pass(module, params, text) if dtype is None else scanned(static, new_cache(static, 2, 400))
    close(out, expected, atol=5e-5)


def test_a_ring_takes_the_bytes_of_its_window():
    bytes_of = lambda window, length: mqa_jax.cache_bytes(
        new_cache(make(cache_layout="ring", local_window_size=window)[0], max_length=length)
    )
    assert bytes_of(6, 1) == bytes_of((6, 0), 10**9) == 3 * SLOTS * 2 * 4 * 4 * 2
    assert bytes_of(4095, 1) == 3 * (4095 + 16) * 2 * 4 * 4 * 2


def test_a_ring_is_read_in_place():
    """For a step nothing of its size is copied."""
    module, params = make(cache_layout="ring", local_window_size=(8191, 0))
    cache = new_cache(module)
    compiled = jax.jit(functools.partial(eager_step, module), donate_argnums=1).lower(params, cache, X[:, :1]).compile()
    pointer = cache["cached_key"].unsafe_buffer_pointer()
    _, changed = compiled(params, cache, X[:, :1])
    assert changed["cached_key"].unsafe_buffer_pointer() == pointer
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < changed["cached_key"].nbytes / 2


def test_a_mask_that_ends_before_the_last_token_is_refused():
    module, params = make(**RING)
    _, cache = cached(module, params, (20, 10))
    mask = jnp.ones((3, 31), bool)
    with pytest.raises(ValueError, match=r"column for each position.*positions=\[32 32 32\].*columns=31"):
        eager_step(module, params, cache, TEXT[:, 30:32], mask=mask)
    out, cache = step(module, params, cache, TEXT[:, 30:32], mask=mask, seq_lengths=jnp.array([1, 2, 1]))
    assert jnp.isnan(out[1]).all()
    assert not jnp.isnan(out[::2, :1]).any()
    out, _ = step(module, params, cache, TEXT[:, 32:33])  # the ring itself took the token
    close(out[1, 0], full_pass(module, params, TEXT[:, :33])[1, 32])
    checked = jax.jit(checkify.checkify(functools.partial(eager_step, module)))
    error, _ = checked(params, cache, TEXT[:, 30:32], mask=mask)
    assert "columns=31" in error.get()


def test_a_ring_is_never_full():
    module, params = make(**RING)
    _, cache = cached(module, params)
    mqa_jax.check_cache({"layer": cache})


# -- 8 bits -----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def attending_to(module, params, x, contents, **arguments):
    """The full pass, but over the keys and values of a static cache."""
    length = x.shape[1]
    key = mqa_jax.dequantize(contents["cached_key"], contents["cached_key_scale"])[:, :length]
    value = mqa_jax.dequantize(contents["cached_value"], contents["cached_value_scale"])[:, :length]
    attend = lambda query, _, __, *pairs, **options: mqa_jax.dot_product_attention(query, key, value, *pairs, **options)
    with mock.patch.object(attention_layer, "dot_product_attention", attend):
        return module.apply({"params": params}, x, **arguments)[0]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_stored_is_rounded_once_and_attended_to_exactly(name, dtype):
    settings = {**OPTIONS[name], "causal": True}
    module, params = make(cache_dtype=dtype, **settings)
    schedule = (5, 1, 20, 2, 1)
    out, cache = cached(module, params, schedule)
    assert cache["cached_key"].dtype == cache["cached_value"].dtype == dtype
    x = TEXT[:, : sum(schedule)]
    close(out, attending_to(module, params, x, cache))
    _, exact = cached(module.clone(cache_dtype=None), params, schedule)
    for stored in ("cached_key", "cached_value"):
        scale = cache[f"{stored}_scale"]
        error = jnp.abs(mqa_jax.dequantize(cache[stored], scale) - exact[stored])
        assert (error <= quantization.rounding_error(dtype, scale)[..., None] * (1 + 1e-5)).all()
        assert error.any()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_ring_in_8_bits_computes_what_a_static_cache_in_8_bits_does(dtype):
    module, params = make(cache_dtype=dtype, rope=mqa_jax.Rope(), alibi=True, sinks=True, **RING)
    out, _ = cached(module, params)
    close(out, cached(module.clone(cache_layout="static"), params)[0])


@pytest.mark.parametrize("layout", ["static", "ring"])
def test_no_copy_of_the_cache_in_more_than_8_bits(layout):
    """What a step needs beside the cache is less than the cache in 16 bits would be, by far."""
    settings: dict[str, Any] = dict(cache_dtype="int8", cache_layout=layout, local_window_size=(2**14, 0))
    module = mqa_jax.GroupedQueryAttention(256, 4, kv_heads=2, **settings)
    x = jnp.zeros((2, 1, 256))
    params = module.init(RNG, x)["params"]
    cache = module.init_cache(2, 2**14)
    assert mqa_jax.cache_bytes(cache) > 4 << 20
    compiled = jax.jit(functools.partial(eager_step, module), donate_argnums=1).lower(params, cache, x).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_bytes_of_8_bits(dtype):
    bytes_of = lambda **settings: mqa_jax.cache_bytes(
        mqa_jax.GroupedQueryAttention(512, 8, **settings).init_cache(2, 100)
    )
    assert bytes_of(cache_dtype=dtype) <= 0.54 * bytes_of(cache_dtype=jnp.bfloat16)
    assert 8 * bytes_of(cache_dtype=dtype, kv_heads=1) == bytes_of(cache_dtype=dtype, kv_heads=8)


def test_nan_in_a_token_stays_where_it_is_seen():
    """Quantized it would be some number; its scale says that it is none."""
    module, params = make(cache_dtype="int8")
    out, _ = cached(module, params, (2, 1, 1, 3), x=TEXT.at[1, 2].set(jnp.nan))
    np.testing.assert_array_equal(jnp.isnan(out).all(-1)[1], [False, False, True, True, True, True, True])
    assert not jnp.isnan(out[::2]).any()


# -- every cache, any schedule ----------------------------------------------------------------------------------------


@pytest.mark.slow
@hypothesis.given(st.data(), st.sampled_from([None, *EIGHT_BITS]))
@hypothesis.settings(max_examples=15)
def test_any_schedule_of_chunks_steps_resets_and_reorderings(data, dtype):
    """A ring beside a static cache of the same dtype, and that beside the full pass over the tokens of each row.

    With `qk_gn` and features of size 1 in the root mean square, |q|_1 is at most H, so the bound of
    `mqa_jax.quantization` can be told without knowing the query.
    """
    settings: dict[str, Any] = dict(qk_gn=True, norm_type="rmsnorm", rope=mqa_jax.Rope(), output_projection=False)
    static, params = make(cache_dtype=dtype, local_window_size=WINDOW, **settings)
    ring = static.clone(cache_layout="ring")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    caches = [new_cache(module, max_length=LENGTH) for module in (static, ring)]
    texts = [np.zeros((0, 24), np.float32)] * 3
    for _ in range(data.draw(st.integers(2, 8))):
        action = data.draw(st.sampled_from(["tokens", "tokens", "tokens", "reset", "reorder"]))
        if action == "reset":
            rows = rng.random(3) < 0.5
            caches = [mqa_jax.reset_cache(cache, rows) for cache in caches]
            texts = [text[:0] if reset else text for text, reset in zip(texts, rows)]
        elif action == "reorder":
            order = rng.integers(0, 3, 3)
            caches = [mqa_jax.reorder_cache(cache, order) for cache in caches]
            texts = [texts[row] for row in order]
        else:
            length = data.draw(st.sampled_from([1, 4, 20]))
            lengths = np.minimum(rng.integers(0, length + 1, 3), [LENGTH - len(text) for text in texts])
            new = rng.standard_normal((3, length, 24)).astype(np.float32)
            call = functools.partial(step, params=params, x=jnp.asarray(new), seq_lengths=jnp.asarray(lengths))
            results = [call(module, cache=cache) for module, cache in zip((static, ring), caches)]
            (expected, _), (out, _) = results
            caches = [cache for _, cache in results]
            texts = [np.concatenate([text, x[:count]]) for text, x, count in zip(texts, new, lengths)]
            for row, count in enumerate(lengths):
                close(out[row, :count], expected[row, :count])
                allowed = 2e-5 + (0 if dtype is None else bound(caches[0], row, len(texts[row]), dtype))
                assert (
                    np.abs(expected[row, :count] - full_rows(static, params, texts[row], count)).max(initial=0)
                    < allowed
                )
    for cache, index in zip(caches, ("cache_index", "ring_index")):
        np.testing.assert_array_equal(cache[index], [len(text) for text in texts])


def full_rows(module, params, text, count):
    """The last `count` rows of the full pass over a text."""
    padded = np.zeros((1, LENGTH, 24), np.float32)
    padded[0, : len(text)] = text
    return full_pass(module, params, padded)[0, len(text) - count : len(text)]


def bound(cache, row, length, dtype) -> float:
    """Of `mqa_jax.quantization`, for all queries of a row, with H = 4."""
    cut = {name: x[row, :length] for name, x in cache.items() if x.ndim > 1}
    if not length:
        return 0.0
    delta = 4**-0.5 * 4 * quantization.rounding_error(dtype, cut["cached_key_scale"]).max()
    error = quantization.rounding_error(dtype, cut["cached_value_scale"]).max()
    values = mqa_jax.dequantize(cut["cached_value"], cut["cached_value_scale"])
    return float(jnp.tanh(delta / 2) * (values.max() - values.min() + 2 * error) + error)
