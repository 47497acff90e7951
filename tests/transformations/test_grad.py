"""`jax.grad`, with `jax.checkpoint` and `jax.lax.scan`: of what is asked for, and of nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from causal_problem import ARRAYS, attend, close, gradient

import mqa_jax


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable])
def test_remat(policy):
    remat = jax.checkpoint(attend, policy=policy)
    close(jax.grad(lambda *arrays: jnp.sum(remat(*arrays) ** 2), argnums=(0, 1, 2))(*ARRAYS), gradient(*ARRAYS))


def test_scan():
    def layer(query, _):
        return attend(query, *ARRAYS[1:])[..., :1] + query, None

    def unrolled(query):
        for _ in range(3):
            query, _ = layer(query, None)
        return query

    scanned = lambda query: jax.lax.scan(layer, query, None, length=3)[0]
    close(scanned(ARRAYS[0]), unrolled(ARRAYS[0]))
    close(*(jax.grad(lambda q, f=f: f(q).sum())(ARRAYS[0]) for f in (scanned, unrolled)))


def test_float0_and_symbolic_zeros():
    """Only some arguments are differentiated, only one result is used."""
    query, key, value = ARRAYS
    loss = lambda key: jnp.sum(attend(query, key, value, return_residual=True)[1])
    close(jax.grad(loss)(key), jax.grad(lambda k: jnp.sum(attend(query, k, value, return_residual=True)[1]))(key))
    whole = jax.grad(lambda *a: jnp.sum(attend(*a, return_residual=True)[1]), argnums=(0, 1, 2))(*ARRAYS)
    close(jax.grad(loss)(key), whole[1])
    assert not whole[2].any()


@pytest.mark.parametrize("way", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_no_gradient_that_is_asked_for_is_left_out(way):
    """JAX keeps what it traced for some operands and uses it for others: one function, differentiated both ways."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    operands = *ARRAYS, normal(1, 4, 13, 17), normal(4), normal(4)

    def loss(implementation):
        def function(query, key, value, bias, slopes, sinks):
            options = dict(alibi_slopes=slopes, sinks=sinks, implementation=implementation)
            return jnp.sum(attend(query, key, value, bias, **options) ** 2)

        return function

    expected = jax.grad(loss("reference"), argnums=range(6))(*operands)
    function = way(loss("xla"))
    for wanted in [(0, 1, 2), (0, 3, 4, 5), (3,), (4,), (0,)]:
        actual = jax.jit(jax.grad(function, argnums=wanted))(*operands)
        close(actual, tuple(expected[number] for number in wanted), atol=1e-4)


def _layers(function):
    """Three of them, scanned and rematerialised."""

    def scanned(query, *others):
        layer = jax.checkpoint(lambda x, _: (function(x, *others), None))
        return jax.lax.scan(layer, query, None, length=3)[0]

    return scanned


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.checkpoint, _layers], ids=["plain", "checkpoint", "scan"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_bias_that_nobody_differentiates_costs_no_gradient(wrapper, stopped):
    """Neither the array of its size nor the work; with `stop_gradient` as well."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    operands = *[array(1, 1024, 4, 16)] * 3, array(1, 4, 1024, 1024)

    def function(query, key, value, bias):
        bias = jax.lax.stop_gradient(bias) if stopped else bias
        return mqa_jax.dot_product_attention(query, key, value, bias, implementation="xla")

    gradient = jax.grad(lambda *arrays: jnp.sum(wrapper(function)(*arrays)), argnums=(0, 1, 2))
    memory: Any = jax.jit(gradient).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1024 * 1024 * 4
