"""Keys and values in 8 bits: rounding, the bound on attention that the docstring derives, and numbers at the edges."""

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from hypothesis import strategies as st

import mqa_jax
from mqa_jax import quantization

DTYPES = "int8", "float8_e4m3fn"
A_LITTLE = 1 + 1e-5  # float32 rounds the scale and the quotient


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(dtype):
    """Tokens of very different size, each of which has its own scale."""
    x = jax.random.normal(jax.random.key(0), (3, 50, 2, 16)) * 10.0 ** jnp.linspace(-30, 30, 50)[:, None, None]
    stored, scale = mqa_jax.quantize(x, dtype)
    assert (stored.dtype, scale.dtype, scale.shape) == (dtype, jnp.float32, (3, 50, 2))
    error = jnp.abs(mqa_jax.dequantize(stored, scale) - x)
    allowed = quantization.rounding_error(dtype, scale)[..., None] * A_LITTLE
    assert (error <= allowed).all()
    assert (error > 0.9 * allowed).any()  # nor could it be less
    np.testing.assert_allclose(jnp.abs(stored.astype(jnp.float32)).max(-1), quantization.largest(dtype))


def test_small_features_in_float8():
    x = jnp.array([448.0, 100.0, 3.3, 0.51, 2.0**-9, -0.07])[None, None]
    stored = mqa_jax.dequantize(*mqa_jax.quantize(x, "float8_e4m3fn"))
    assert (jnp.abs(stored - x) <= jnp.abs(x) / 16).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_at_the_edges(dtype):
    zero, tiny, largest = jnp.zeros((1, 1, 4)), jnp.full((1, 1, 4), 1e-44), jnp.full((1, 1, 4), 3e38)
    store = lambda x: mqa_jax.dequantize(*mqa_jax.quantize(x, dtype))
    assert not store(zero).any()
    assert jnp.isfinite(store(tiny)).all()
    np.testing.assert_allclose(store(largest), largest, rtol=1e-5)
    for wrong in (jnp.nan, jnp.inf, -jnp.inf):
        assert not jnp.isfinite(store(zero.at[..., 2].set(wrong))).any()


def bound(problem: oracle.Problem, stored: oracle.Problem, dtype: str) -> np.ndarray:
    """What `mqa_jax.quantization` derives, `[..., T, N, V]`, with all keys instead of those that a query may see."""
    arrays, options = problem.arrays, problem.options
    group = arrays["query"].shape[-2] // arrays["key"].shape[-2]
    of_heads = lambda x: jnp.repeat(x, group, axis=-1)
    error_k, error_v = (
        of_heads(quantization.rounding_error(dtype, stored.options[name]).max(-2))
        for name in ("key_scale", "value_scale")
    )  # [..., N]
    scale = options.get("scale") or arrays["query"].shape[-1] ** -0.5
    delta = scale * jnp.abs(arrays["query"]).sum(-1) * error_k[..., None, :]  # [..., T, N]
    values = jnp.repeat(arrays["value"], group, axis=-2)
    with_sink: dict[str, Any] = dict(initial=0.0) if "sinks" in arrays else {}
    width = values.max(-3, **with_sink) - values.min(-3, **with_sink)  # [..., N, V]
    return np.asarray(jnp.tanh(delta / 2)[..., None] * width[..., None, :, :] + error_v[..., None, :, None] + 1e-5)


def distance(problem: oracle.Problem, stored: oracle.Problem) -> np.ndarray:
    run = functools.partial(oracle.outputs, implementation="reference")
    return np.abs(np.asarray(run(problem)["out"] - run(stored)["out"]))


@pytest.mark.slow
@hypothesis.given(problems.problems(), st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=12)
def test_attention_moves_no_further_than_the_bound(problem, dtype):
    options = {name: x for name, x in problem.options.items() if not name.startswith("dropout")}
    problem = oracle.Problem(problem.arrays, options)
    stored = oracle.quantized(problem, dtype)
    assert (distance(problem, stored) <= bound(problem, stored, dtype) * A_LITTLE).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_says_something(dtype):
    """Errors come within a factor of 50 of it, and scales that are four times too large are beyond it."""
    rng = np.random.default_rng(0)
    problem = oracle.random_problem(rng, rows=5, columns=4, heads=4, kv_heads=2, features=8)
    stored = oracle.quantized(problem, dtype)
    allowed = bound(problem, stored, dtype)
    assert (distance(problem, stored) > allowed / 50).any()
    coarse = {name: 4 * jnp.round(stored.arrays[name].astype(jnp.float32) / 4) for name in ("key", "value")}
    coarse = {name: x.astype(dtype) for name, x in coarse.items()}
    worse = oracle.Problem(stored.arrays | coarse, stored.options)
    if dtype == "int8":
        assert (distance(problem, worse) > allowed).any()
