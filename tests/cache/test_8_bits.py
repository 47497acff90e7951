"""Caches in 8 bits: what is stored is rounded once, and attention to it is exact."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import RNG, close, eager_step, make
from rings import EIGHT_BITS, OPTIONS, RING, TEXT, cached

import mqa_jax
from mqa_jax import quantization
from mqa_jax.layer import cut_sequence

pytestmark = pytest.mark.usefixtures("skin")
SKINS = ("linen",)  # test_nnx.py compares the bits of NNX with it; test_schedules.py runs with both


@functools.partial(jax.jit, static_argnums=0)
def attending_to(module, params, x, contents, **arguments):
    """The full pass, but over the keys and values of a static cache."""
    length = x.shape[1]
    key = mqa_jax.dequantize(contents["cached_key"], contents["cached_key_scale"])[:, :length]
    value = mqa_jax.dequantize(contents["cached_value"], contents["cached_value_scale"])[:, :length]
    attend = lambda query, _, __, *pairs, **options: mqa_jax.dot_product_attention(query, key, value, *pairs, **options)
    with mock.patch.object(cut_sequence, "dot_product_attention", attend):
        return module.apply({"params": params}, x, **arguments)[0]


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


@pytest.mark.slow
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
