"""The oracle against sums that are written out, one query at a time, in float64 numpy."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import mqa_jax


def _one_row(query, key, value, score_of, visible, sink):
    """One head, one query: the definition."""
    scores = [score_of(query, key[s], s) if visible(s) else -math.inf for s in range(len(key))]
    terms = [*scores, sink] if sink is not None else scores
    if max(terms, default=-math.inf) == -math.inf:
        return np.zeros(value.shape[-1]), -math.inf
    total = sum(math.exp(score) for score in terms)
    out = sum(math.exp(score) / total * value[s] for s, score in enumerate(scores))
    return out, math.log(total)


def test_everything_at_once_by_the_definition():
    rows, columns, heads, kv_heads = 5, 7, 6, 2
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal(s) for s in ((rows, heads, 3), (columns, kv_heads, 3), (columns, kv_heads, 4))
    )
    bias, slopes, sinks = rng.standard_normal((heads, rows, columns)), rng.random(heads), rng.standard_normal(heads)
    mask, lengths, query_offset = rng.random((heads, rows, columns)) > 0.2, 6, 1
    mask[:, 3] = False
    sinks[1] = -math.inf
    scale, cap, window = 0.4, 1.5, (4, 0)
    narrow = lambda *arrays: [jnp.asarray(x, jnp.float32) for x in arrays]
    attend: Any = mqa_jax.dot_product_attention
    out, log_sum_exp = attend(
        *narrow(query, key, value, bias),
        mask,
        scale=scale,
        is_causal=True,
        query_offset=query_offset,
        local_window_size=window,
        key_value_seq_lengths=jnp.int32(lengths),
        logits_soft_cap=cap,
        alibi_slopes=narrow(slopes)[0],
        sinks=narrow(sinks)[0],
        implementation="reference",
        return_residual=True,
    )
    for t in range(rows):
        for n in range(heads):
            position, head = t + query_offset, n // (heads // kv_heads)

            def score_of(q, k, s, n=n, t=t, position=position):
                return cap * math.tanh(scale * q @ k / cap) + bias[n, t, s] - slopes[n] * abs(position - s)

            def visible(s, n=n, t=t, position=position):
                return s <= position and s >= position - window[0] and s < lengths and mask[n, t, s]

            expected = _one_row(query[t, n], key[:, head], value[:, head], score_of, visible, sinks[n])
            np.testing.assert_allclose(out[t, n], expected[0], atol=1e-6)
            np.testing.assert_allclose(log_sum_exp[t, n], expected[1], atol=1e-6)


@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "alibi_slopes", "sinks"])
def test_its_gradients_are_differences_of_its_values(name):
    rng = np.random.default_rng(0)
    small = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    problem = oracle.random_problem(
        rng,
        batch=(),
        rows=3,
        columns=4,
        heads=2,
        kv_heads=1,
        features=2,
        bias=small(2, 1, 4),
        alibi_slopes=small(2),
        sinks=small(2),
        logits_soft_cap=2.0,
        is_causal=True,
        query_offset=1,
    )

    def total(x):
        arrays = problem.arrays | {name: x}
        out, log_sum_exp = mqa_jax.dot_product_attention(
            **arrays, **problem.options, implementation="reference", return_residual=True
        )
        return jnp.sum(out * problem.cotangents[0]) + jnp.sum(log_sum_exp * problem.cotangents[1])

    gradient, x = jax.grad(total)(problem.arrays[name]), problem.arrays[name]
    for index in np.ndindex(x.shape):
        step = jnp.zeros_like(x).at[index].set(1e-2)
        slope = (total(x + step) - total(x - step)) / 2e-2
        np.testing.assert_allclose(gradient[index], slope, atol=2e-3)


def test_dropped_weights_are_the_weights_that_multiply_the_values():
    from mqa_jax.attention import attention_with_weights
    from mqa_jax.options import Options

    problem = oracle.random_problem(np.random.default_rng(0), rows=9, columns=11, heads=4, kv_heads=2, features=8)
    query, key, value = (problem.arrays[name] for name in ("query", "key", "value"))
    options = Options(dropout_rate=0.5, dropout_rng=jax.random.key(0))
    out, log_sum_exp, weights = attention_with_weights(query, key, value, None, None, options)
    np.testing.assert_allclose(jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(value, 2, axis=2)), out, atol=1e-6)
    assert 0.3 < float(jnp.mean(weights == 0)) < 0.7
    plain = attention_with_weights(query, key, value, None, None, Options())
    np.testing.assert_allclose(plain[1], log_sum_exp, rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(plain[2], axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(weights, jnp.where(weights == 0, 0, 2 * plain[2]), rtol=1e-6)
