"""What the transformations are tried on: causal attention of some 13 queries to 17 keys."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle

import mqa_jax

PROBLEM = oracle.random_problem(
    np.random.default_rng(0), batch=(2,), rows=13, columns=17, heads=4, kv_heads=2, features=8, value_features=4
)
ARRAYS = tuple(PROBLEM.arrays.values())
attend = functools.partial(mqa_jax.dot_product_attention, is_causal=True, query_offset=3)
gradient = jax.grad(lambda *arrays: jnp.sum(attend(*arrays) ** 2), argnums=(0, 1, 2))


def close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **{"atol": 1e-5, **tolerance}), actual, expected)
