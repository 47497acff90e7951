"""What modules of `mqa_jax.nnx` keep: views, caches and streams of random numbers, decoding and training with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import skins
from flax import nnx
from jax import export
from nnx_errors import make
from test_nnx import X, same

import mqa_jax
from mqa_jax import linen as mqa_linen
from mqa_jax import nnx as mqa_nnx

pytestmark = skins.needs_modes


# -- views and caches --------------------------------------------------------------------------------------------------


def test_views(mode):
    """Share weights, not caches."""
    module = make()
    first, second = (nnx.view(module, decode=True, batch_size=2, max_length=9) for _ in range(2))
    first(X)
    assert first.query.kernel is module.query.kernel
    assert (first.cache_index[...].tolist(), second.cache_index[...].tolist()) == ([7, 7], [0, 0])
    kept, without = nnx.view(first, decode=True), nnx.view(first, decode=False)
    assert kept.cached_key is first.cached_key
    same(without(X), module(X))
    assert nnx.view(module, decode=True, batch_size=2, max_length=9, cache_dtype="int8").cached_key.dtype == jnp.int8
    ring = make(cache_layout="ring", local_window_size=(3, 0))
    assert nnx.view(ring, decode=True, batch_size=2).cached_key.shape == (2, 19, 2, 4)


def test_a_view_of_a_decoder_leaves_cross_attention_without_a_cache(mode):
    class Decoder(nnx.Module):
        def __init__(self):
            self.own, self.cross = make(), make(causal=False, rope=None, in_kv_features=10)

        def __call__(self, x, context):
            x = x + self.own(x)[0]
            return x + self.cross(x, inputs_k=context)[0]

    model, context = Decoder(), X[:, :5, :10]
    view = nnx.view(model, only=lambda path, _: "cross" not in path, decode=True, batch_size=2, max_length=9)
    step = nnx.jit(lambda m, x: m(x, context))
    full = model(X, context)
    np.testing.assert_allclose(jnp.concatenate([step(view, X[:, :5]), step(view, X[:, 5:])], 1), full, atol=1e-5)


def test_view_info():
    text = nnx.view_info(make())
    for name in ("deterministic", "decode", "batch_size", "max_length", "cache_dtype", "calls"):
        assert f"  {name}: " in text


def test_init_cache_and_what_is_done_with_it(mode):
    module = make()
    mqa_nnx.init_cache(module, 2, 9)
    module(X[:, :4])
    assert mqa_nnx.cache_bytes(module) == 2 * 2 * 9 * 2 * 4 * 4
    mqa_nnx.check_cache(module)
    expected = mqa_jax.reorder_cache(nnx.to_pure_dict(nnx.state(module, nnx.Cache)), np.array([1, 1]))
    state = mqa_nnx.reorder_cache(nnx.state(module, nnx.Cache), np.array([1, 1]))
    same(nnx.to_pure_dict(state), expected)
    assert mqa_nnx.reorder_cache(module, np.array([1, 1])) is None
    same(nnx.to_pure_dict(nnx.state(module, nnx.Cache)), expected)
    mqa_nnx.reset_cache(module, np.array([True, False]))
    np.testing.assert_array_equal(module.cache_index[...], [0, 4])
    with pytest.raises(ValueError, match="cache is full"):
        module(X)


def test_a_module_that_a_step_calls_several_times(mode):
    module = make()
    view = nnx.view(module, decode=True, batch_size=2, max_length=9, calls=3)
    thrice = lambda m, x: x + m(x + m(x + m(x)[0])[0])[0]
    step = nnx.jit(thrice)
    out = jnp.concatenate([step(view, X[:, :4]), step(view, X[:, 4:5]), step(view, X[:, 5:])], 1)
    np.testing.assert_allclose(out, thrice(module, X), atol=1e-5)
    mqa_nnx.reorder_cache(view, np.array([1, 0]))
    assert mqa_nnx.cache_bytes(view) == 3 * 2 * 2 * 9 * 2 * 4 * 4


def test_layers_stacked_for_scan(mode):
    layers = nnx.vmap(lambda rngs: make(rngs), in_axes=0, out_axes=0)(nnx.Rngs(0).split(4))
    run = nnx.scan(lambda x, layer: x + layer(x)[0], in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    view = nnx.view(layers, decode=True, batch_size=2, max_length=9)
    assert view.cached_key.shape == (4, 2, 9, 2, 4)
    step = nnx.jit(lambda view, x: run(x, view))
    outputs = [step(view, X[:, :4]), step(view, X[:, 4:5]), step(view, X[:, 5:])]
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), run(X, layers), atol=1e-5)
    mqa_nnx.reset_cache(view, np.array([True, False]), batch_axis=-1)
    np.testing.assert_array_equal(view.cache_index[...], [[0, 7]] * 4)


def test_a_decoding_step_writes_in_place(mode):
    view = nnx.view(make(), decode=True, batch_size=2, max_length=2**12)
    step, cache = mqa_nnx.decoding_step(view)
    pointer = cache["cached_key"][...].unsafe_buffer_pointer()
    out, new = step(cache, X)
    assert new["cached_key"][...].unsafe_buffer_pointer() == pointer
    assert cache["cached_key"].get_value().is_deleted()
    np.testing.assert_allclose(out[0], make()(X)[0], atol=1e-5)
    nnx.update(view, new)
    np.testing.assert_array_equal(view.cache_index[...], [7, 7])
    twice = lambda m, x: m(x)[0] + m(x)[0]
    step, cache = mqa_nnx.decoding_step(nnx.view(make(), decode=True, batch_size=2, max_length=16), twice)
    np.testing.assert_array_equal(step(cache, X)[1]["cache_index"][...], [14, 14])


def test_a_step_is_exported():
    graphdef, state = nnx.split(nnx.view(make(), decode=True, batch_size=2, max_length=9))
    leaves, structure = jax.tree.flatten(state)

    def step(leaves, x):
        module = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        return module(x)[0], jax.tree.leaves(nnx.state(module))

    blob = export.export(jax.jit(step))(leaves, X).serialize()
    same(export.deserialize(blob).call(leaves, X)[0], jax.jit(step)(leaves, X)[0])


# -- training ----------------------------------------------------------------------------------------------------------


def test_training_with_dropout(mode):
    """Losses equal in both modes, because both draw the same keys."""
    module = make(attn_pdrop=0.1, deterministic=False)
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        graphdef, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]

        def loss(params):
            merged = nnx.merge(graphdef, params, rest)
            out = jax.checkpoint(lambda x: merged(x, rngs=key)[0])(X)
            return jnp.mean(out**2)

        key = module.rngs()
        value, gradients = jax.value_and_grad(loss)(params)
        optimizer.update(module, gradients)
        return value

    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        losses = [float(step(module, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert int(module.rngs.count[...]) == 4
    TRAINED.setdefault("losses", losses)
    np.testing.assert_allclose(losses, TRAINED["losses"], rtol=1e-6)


TRAINED: dict[str, list[float]] = {}


def test_nnx_grad_of_a_module():
    rematerialised = nnx.remat(lambda m, x: m(x, deterministic=False)[0])
    gradients = nnx.grad(lambda m: jnp.mean(rematerialised(m, X) ** 2))(make(attn_pdrop=0.1))
    assert gradients["query"]["kernel"].shape == (24, 6, 4)


def test_dropout_has_the_stored_stream_or_that_of_the_call(mode):
    module = make(attn_pdrop=0.5, deterministic=False)
    first, second = module(X)[0], module(X)[0]
    assert np.abs(first - second).max() > 1e-3
    given = lambda rngs: module(X, rngs=rngs)[0]
    same(given(nnx.Rngs(dropout=3)), given(nnx.Rngs(3).dropout))
    key = jax.random.key(7)
    same(given(key), given(key))
    assert int(module.rngs.count[...]) == 2  # a stream of the call leaves the stored one where it is
    same(nnx.view(module, deterministic=True)(X)[0], make()(X)[0])
    same(module(X, deterministic=True)[0], make()(X)[0])  # the call comes before the module


def test_the_same_key_drops_the_same_weights_as_in_linen():
    module, key = make(attn_pdrop=0.5, deterministic=False), jax.random.key(3)

    class Fixed(mqa_linen.GroupedQueryAttention):
        def make_rng(self, name="params"):
            return key if name == "dropout" else super().make_rng(name)

    linen = Fixed(24, 6, kv_heads=2, rope=mqa_jax.Rope(), attn_pdrop=0.5, deterministic=False)
    same(linen.apply({"params": mqa_nnx.to_linen(module)}, X)[0], module(X, rngs=key)[0])


def test_dropout_without_a_stored_stream():
    module = make(attn_pdrop=0.5, deterministic=False, keep_rngs=False)
    assert not jax.tree.leaves(nnx.state(module, nnx.RngState))
    assert jnp.isfinite(module(X, rngs=nnx.Rngs(0))[0]).all()
    flash = mqa_nnx.FlashAttention(dropout=0.5, deterministic=False, rngs=nnx.Rngs(0))
    q = X.reshape(2, 7, 6, 4).swapaxes(1, 2)
    assert np.abs(flash(q, q, q) - nnx.view(flash, deterministic=True)(q, q, q)).max() > 1e-3


def test_keys_for_parameters_alone():
    module = mqa_nnx.GroupedQueryAttention(24, 6, attn_pdrop=0.5, rngs=nnx.Rngs(params=0))
    assert module(X, deterministic=True)[0].shape == X.shape
    assert module(X, deterministic=False, rngs=nnx.Rngs(1))[0].shape == X.shape


@pytest.mark.parametrize("scale", [np.float32(0.3), np.array(0.3), jnp.float32(0.3)], ids=["number", "numpy", "jax"])
def test_a_setting_that_is_an_array_is_a_number(scale, mode):
    """Else it would be part of the state, and traced."""
    module = make(softmax_scale=scale)
    np.testing.assert_allclose(nnx.jit(lambda m: m(X)[0])(module), make(softmax_scale=0.3)(X)[0], atol=1e-6)


def test_a_causal_mask_is_what_causal_is():
    module, mask = make(), jnp.tril(jnp.ones((7, 7), bool))[None]
    same(module(X)[0], module(X, mask=mask, causal=False)[0])
