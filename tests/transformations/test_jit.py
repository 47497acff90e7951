"""`jax.jit`: the same results, one trace, donation, lowering for other platforms."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import pytest
from causal_problem import ARRAYS, attend, close, gradient

import mqa_jax


def test_jit():
    close(jax.jit(gradient)(*ARRAYS), gradient(*ARRAYS))


def test_one_trace_for_all_values_of_traced_options():
    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(offset, lengths, rng):
        return mqa_jax.dot_product_attention(
            *ARRAYS, query_offset=offset, key_value_seq_lengths=lengths, dropout_rate=0.1, dropout_rng=rng
        )

    for i in range(3):
        step(jnp.array([i, 2]), jnp.array([7, i]), jax.random.key(i))


def test_donation():
    query = ARRAYS[0][..., :4] + 0  # as large as the output
    step = jax.jit(lambda q: attend(q, ARRAYS[1][..., :4], ARRAYS[2]), donate_argnums=0)
    expected = attend(query, ARRAYS[1][..., :4], ARRAYS[2])
    close(step(query), expected)
    assert query.is_deleted()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowering_for_a_platform_that_is_not_here(platform):
    """What runs is settled when it is lowered; the default device of this process has no say."""
    loss = lambda *arrays: jnp.sum(attend(*arrays, implementation="xla") ** 2)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*ARRAYS)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text
    others = [traced.lower(lowering_platforms=(other,)).as_text() for other in ("cpu", "cuda")]
    assert others[0] != others[1]  # other tiles
    assert text == others[platform != "cpu"]
