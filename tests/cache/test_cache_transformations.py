"""Cached steps under JAX's transformations and Flax's."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import LENGTH, MAX_LENGTH, RNG, X, close, eager_step, full_pass, make, new_cache, step
from jax import export
from jax.experimental import checkify

import mqa_jax

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare


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
