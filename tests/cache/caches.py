"""A small module, a text, and how a cached call of the one on the other is made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import mqa_jax

RNG = jax.random.key(0)
LENGTH, MAX_LENGTH = 11, 16
X = jax.random.normal(jax.random.key(1), (3, LENGTH, 24))
close = functools.partial(np.testing.assert_allclose, atol=2e-5)


def make(**settings):
    """A module and its parameters."""
    module = mqa_jax.GroupedQueryAttention(24, 6, **{"kv_heads": 2, **settings})
    return module, module.init(RNG, X)["params"]


def new_cache(module, batch=3, max_length=MAX_LENGTH, **options):
    return mqa_jax.init_cache(module, batch, max_length, jax.ShapeDtypeStruct((batch, 2, 24), jnp.float32), **options)


def eager_step(module, params, cache, x, **options):
    with jax.numpy_rank_promotion("raise"):  # as careful users set it; the tests themselves promote
        (out, _, _), changed = module.apply({"params": params, "cache": cache}, x, mutable=["cache"], **options)
    return out, changed["cache"]


step = jax.jit(eager_step, static_argnums=0)
full_pass = jax.jit(
    lambda module, params, x, **options: module.apply({"params": params}, x, **options)[0], static_argnums=0
)


def run(module, params, chunks, x=X, cache=None):
    """Feeds `x` in chunks of these lengths; the outputs one after the other, and the cache."""
    cache = new_cache(module, x.shape[0]) if cache is None else cache
    outputs, start = [], 0
    for length in chunks:
        out, cache = step(module, params, cache, x[:, start : start + length])
        outputs.append(out)
        start += length
    return jnp.concatenate(outputs, axis=1), cache


def nearly_full(length=9):
    """Row 1 has no room for two more tokens."""
    module, params = make()
    cache = new_cache(module, max_length=length)
    _, cache = step(module, params, cache, X[:, : length - 1], seq_lengths=jnp.array([4, length - 1, 6]))
    return module, params, cache
