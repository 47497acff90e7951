"""Settings of JAX: `jax_enable_x64`, matmul precision, `jax_numpy_rank_promotion`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from causal_problem import ARRAYS, attend

import mqa_jax


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_jax_enable_x64_changes_nothing(implementation, rows):
    """Python numbers are then 64 bits wide, and 64-bit lengths stay so."""
    rng = np.random.default_rng(0)
    problem = oracle.random_problem(
        rng,
        batch=(16,),
        rows=rows,
        columns=17,
        heads=4,
        kv_heads=2,
        features=8,
        bias=jnp.asarray(rng.standard_normal((4, 1, 17)), jnp.float32),
        sinks=jnp.ones(4),
        alibi_slopes=mqa_jax.alibi_slopes(4),
        is_causal=True,
        query_offset=3,
        key_value_seq_lengths=np.arange(16),
        query_segment_ids=np.zeros((16, rows), np.int64),
        key_value_segment_ids=np.zeros((16, 17), np.int64),
        local_window_size=5,
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )
    expected = oracle.results(problem, "reference")
    with jax.enable_x64(True):
        actual = oracle.results(problem, implementation)
    oracle.judge_float32(actual, expected)


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_float64_is_computed_in_float64(implementation, rows):
    """Output, log-sum-exp and gradients, with every option, against sums in numpy and each other."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
        arrays: dict[str, Any] = dict(query=normal(8, rows, 4, 8), key=normal(8, 17, 2, 8), value=normal(8, 17, 2, 8))
        arrays |= dict(bias=normal(4, rows, 17), alibi_slopes=normal(4) / 8, sinks=normal(4))
        options: dict[str, Any] = dict(
            key_value_seq_lengths=np.arange(8) + 2, logits_soft_cap=2.0, return_residual=True
        )

        def textbook(query, key, value, bias, alibi_slopes, sinks):
            score = np.einsum("btnh,bsnh->bnts", query, key.repeat(2, axis=2)) / 8**0.5
            distance = np.abs(np.arange(17) - np.arange(rows)[:, None])
            score = 2 * np.tanh(score / 2) + bias - alibi_slopes[:, None, None] * distance
            seen = np.arange(17) < options["key_value_seq_lengths"][:, None, None, None]
            weight = np.where(seen, np.exp(score), 0)
            total = weight.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
            out = np.einsum("bnts,bsnv->btnv", weight / total, value.repeat(2, axis=2))
            return out, np.log(total)[..., 0].swapaxes(1, 2)

        attend = functools.partial(mqa_jax.dot_product_attention, **options, implementation=implementation)
        out, log_sum_exp = attend(**arrays)
        assert out.dtype == log_sum_exp.dtype == jnp.float64
        expected = textbook(**{name: np.asarray(x) for name, x in arrays.items()})
        np.testing.assert_allclose(out, expected[0], atol=1e-13)
        np.testing.assert_allclose(log_sum_exp, expected[1], atol=1e-13)
        loss = lambda arrays, name: sum(
            jnp.sum(x**2) for x in mqa_jax.dot_product_attention(**arrays, **options, implementation=name)
        )
        gradients, wanted = (
            jax.jit(jax.grad(loss), static_argnums=1)(arrays, name) for name in (implementation, "reference")
        )
        for name, gradient in gradients.items():
            assert gradient.dtype == jnp.float64
            np.testing.assert_allclose(gradient, wanted[name], atol=1e-12, err_msg=name)
        for name in ("triton", "cudnn"):
            with pytest.raises(NotImplementedError, match="float64"):
                attend(**arrays, implementation=name)


@pytest.mark.parametrize("precision", ["highest", "default", jax.lax.Precision.HIGH])
def test_precision_is_passed_on(precision):
    text = jax.jit(functools.partial(attend, precision=precision)).lower(*ARRAYS).as_text()
    name = jax.lax.Precision(precision).name if not isinstance(precision, str) else precision.upper()
    assert f"precision = [{name}, {name}]" in text


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 13])
def test_precision_is_passed_on_by_every_path(rows, platform):
    """But by the sums that XLA on CPUs takes instead of products: they are exact."""
    query = jax.ShapeDtypeStruct((8, rows, 4, 8), jnp.float32)
    key = jax.ShapeDtypeStruct((8, 17, 2, 8), jnp.float32)
    function = functools.partial(mqa_jax.dot_product_attention, precision="highest", implementation="xla")
    text = jax.jit(function).trace(query, key, key).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert products or (platform, rows) == ("cpu", 1)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("rows", [1, 13])
def test_rank_promotion_may_raise(rows, implementation):
    """jax_numpy_rank_promotion="raise": every option, forward and backward."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    problem = oracle.random_problem(
        rng,
        batch=(8,),
        rows=rows,
        columns=37,
        heads=4,
        kv_heads=2,
        features=8,
        bias=normal(4, 1, 37),
        alibi_slopes=normal(4),
        sinks=normal(4),
        mask=normal(37) > -1,
        is_causal=True,
        local_window_size=9,
        query_offset=jnp.arange(8),
        query_seq_lengths=jnp.full(8, rows),
        key_value_seq_lengths=jnp.arange(8) + 5,
        query_segment_ids=jnp.zeros((8, rows), jnp.int32),
        key_value_segment_ids=jnp.zeros((8, 37), jnp.int32),
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )
    with jax.numpy_rank_promotion("raise"):
        actual = oracle.results(problem, implementation)
    oracle.judge_float32(actual, oracle.results(problem, "reference"))


@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("tokens", [1, 5, 29])
def test_rank_promotion_may_raise_in_modules_with_a_cache(layout, tokens):
    module = mqa_jax.GroupedQueryAttention(
        32, 4, kv_heads=2, rope=mqa_jax.Rope(), local_window_size=(7, 0), cache_layout=layout, qk_ln=True, alibi=True
    )
    x = jnp.ones((2, tokens, 32))
    with jax.numpy_rank_promotion("raise"):
        params = module.init(jax.random.key(0), x)
        cache = module.init_cache(2, 40)
        step = jax.jit(lambda cache: module.apply({**params, "cache": cache}, x, mutable=["cache"]))
        (out, *_), variables = step(cache)
        step(variables["cache"])
    assert jnp.isfinite(out).all()
