"""The modules of `mqa_jax.nnx`: beside those of linen to the last bit, and what only NNX has.

What Flax's tests check of `nnx.MultiHeadAttention` (`tests/nnx/nn/attention_test.py`), and where it is checked of ours:

    basic, multihead_dot_product_attention    test_modules.py, on every skin
    sow attention weights                     does not apply: `needs_weights=True` returns them
    autoregressive decoding against a pass    test_kv_cache.py, test_cache_layouts.py, on every skin
    init_cache missing, decode missing        MISTAKES
    qk norm                                   test_modules.py::test_norms, on every skin
    causal mask equal to is_causal            test_a_causal_mask_is_what_causal_is
    num_kv_heads, of which some do not divide test_modules.py, test_module_errors.py
    equivalence with linen                    test_the_same_bits
    keep_rngs, rngs of a call                 test_dropout_*
    kernel_metadata, ln metadata              test_metadata
    nnx.view, view_info                       test_views, test_view_info
    dot_general, promote_dtype hooks          does not apply: no such settings; `precision` and `dtype` are settings
    out_sharding, qkv_sharding of a call      does not apply: the sharding of parameters and inputs decides
    broadcast_dropout                         does not apply: every weight has its own draw
"""

import inspect
import re
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import skins
import test_cache_errors
import test_module_errors
from flax import nnx
from jax import export
from nnx_errors import MISTAKES, make, through_the_bridge

import mqa_jax
from mqa_jax import linen as mqa_linen
from mqa_jax import nnx as mqa_nnx

pytestmark = skins.needs_modes
X = jax.random.normal(jax.random.key(1), (2, 7, 24))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm, clip and sinks": dict(kv_heads=2, qk_ln=True, clip_qkv=1.0, sinks=True),
    "head norm and rope": dict(kv_heads=2, qk_gn=True, norm_type="rmsnorm", rope=mqa_jax.Rope()),
    "learned and zero key": dict(add_bias_kv=True, add_zero_attn=True),
    "ring in int8": dict(alibi=True, local_window_size=(3, 0), cache_layout="ring", cache_dtype="int8"),
    "float8": dict(kv_heads=1, cache_dtype="float8_e4m3fn", logits_soft_cap=2.0),
    "bfloat16": dict(dtype=jnp.bfloat16, qk_ln=True),
    "no output projection": dict(output_projection=False, attn_temperature_tuning=mqa_jax.TemperatureTuning()),
    "falcon": dict(alibi="falcon", causal=False),
}
same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)


def randomised(module: Any) -> Any:
    """With no parameter that is zero."""
    keys = iter(jax.random.split(jax.random.key(9), 20))
    mqa_nnx.to_nnx(module, jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape) / 3, mqa_nnx.to_linen(module)))
    return module


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    with skins.mode(tree=request.param == "tree"):
        yield request.param


# -- beside linen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@jax.numpy_dtype_promotion("standard")  # which norms of linen in bfloat16 need
def test_the_same_bits(name, mode):
    """Outputs, weights, gradients and caches, eager and compiled."""
    module = randomised(mqa_nnx.GroupedQueryAttention(24, 6, **SETTINGS[name], rngs=nnx.Rngs(0)))
    linen, params = mqa_linen.GroupedQueryAttention(24, 6, **SETTINGS[name]), mqa_nnx.to_linen(module)
    same(module(X, needs_weights=True), linen.apply({"params": params}, X, needs_weights=True))
    same(nnx.jit(lambda m, x: m(x))(module, X), jax.jit(lambda p, x: linen.apply({"params": p}, x))(params, X))
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    loss = lambda out: jnp.mean(out[0].astype(jnp.float32) ** 2)
    gradients = jax.jit(jax.grad(lambda state: loss(nnx.merge(graphdef, state, rest)(X))))(state)
    expected = jax.jit(jax.grad(lambda p: loss(linen.apply({"params": p}, X))))(params)
    same(nnx.to_pure_dict(gradients), expected)
    view, cache = nnx.view(module, decode=True, batch_size=2, max_length=9), linen.init_cache(2, 9)
    step = nnx.jit(lambda m, x: m(x)[0])
    of_linen = jax.jit(lambda p, cache, x: linen.apply({"params": p, "cache": cache}, x, mutable=["cache"]))
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        (out, _, _), variables = of_linen(params, cache, X[:, start:stop])
        cache = variables["cache"]
        same(step(view, X[:, start:stop]), out)
    same(nnx.to_pure_dict(nnx.state(view, nnx.Cache)), cache)
    assert not jax.tree.leaves(nnx.state(module, nnx.Cache))


def test_settings_and_calls_are_those_of_linen():
    for kind in ("GroupedQueryAttention", "MultiQueryAttention", "MultiHeadAttention", "Attention", "FlashAttention"):
        ours, linen = getattr(mqa_nnx, kind), getattr(mqa_linen, kind)
        defaults = lambda cls: {
            name: field.default for name, field in cls.__dataclass_fields__.items() if name not in ("parent", "name")
        }
        assert defaults(ours).items() >= defaults(linen).items()
        call = [x for x in inspect.signature(ours.__call__).parameters.values() if x.name != "rngs"]
        assert call == list(inspect.signature(linen.__call__).parameters.values())
        assert ours.__call__.__doc__
        missing = [f for f in ours.__dataclass_fields__ if not re.search(rf"\b{f}\b", ours.__doc__ + _DOC)]
        assert not missing


_DOC = str(mqa_nnx.GroupedQueryAttention.__doc__)


def test_the_skins_of_the_tests_are_what_they_say(monkeypatch):
    skins.put_on("nnx, tree mode", monkeypatch)
    module = mqa_jax.GroupedQueryAttention(24, 6)
    assert isinstance(module.model, mqa_nnx.GroupedQueryAttention)
    assert module.tree
    assert module == mqa_jax.GroupedQueryAttention(24, 6) != mqa_jax.GroupedQueryAttention(24, 3)


REFUSALS = test_module_errors.MODULES | test_cache_errors.CACHE


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("name", REFUSALS)
def test_mistakes_get_the_sentence_that_they_get_from_linen(name, tree, monkeypatch):
    if name in OF_LINEN:
        return
    wrong, message = REFUSALS[name]
    skins.put_on("nnx, tree mode" if tree else "nnx", monkeypatch)
    with pytest.raises(ValueError, match=r"(?s)" + message):
        wrong()


# What a `cache` collection alone can be, or `init_cache` with sample inputs; and widths, of which NNX says it more.
OF_LINEN = {"not mutable", "another module's", "no attention"}


# -- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_go_to_linen_and_back():
    module = make(sinks=True, qk_gn=True)
    params = mqa_nnx.to_linen(module)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, mqa_linen.GroupedQueryAttention(24, 6, kv_heads=2, sinks=True, qk_gn=True).init(jax.random.key(0), X)
    ).get("params")
    again = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(jax.tree.map(np.asarray, params)))
    other = make(nnx.Rngs(1), sinks=True, qk_gn=True)
    mqa_nnx.to_nnx(other, again)
    same(other(X), module(X))
    linen = mqa_linen.GroupedQueryAttention(24, 6, kv_heads=2, rope=mqa_jax.Rope(), sinks=True, qk_gn=True)
    same(mqa_nnx.from_linen(linen, params)(X), module(X))


def test_lists_of_layers_have_the_names_of_linen():
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.List([make(), make()])

    model, other = Model(), Model()
    params = mqa_nnx.to_linen(model)
    assert set(params) == {"layer_0", "layer_1"}
    changed = jax.tree.map(lambda x: x + 1, params)
    mqa_nnx.to_nnx(other, changed)
    same(mqa_nnx.to_linen(other), changed)
    abstract = nnx.eval_shape(Model)
    same(mqa_nnx.to_linen(jax.jit(lambda params: mqa_nnx.with_params(abstract, params))(changed)), changed)


def test_orbax_keeps_a_model_with_its_cache(tmp_path):
    view = nnx.view(make(cache_dtype="int8"), decode=True, batch_size=2, max_length=9)
    view(X[:, :4])
    pure = nnx.to_pure_dict(nnx.state(view))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", pure)
    other = nnx.view(make(nnx.Rngs(5), cache_dtype="int8"), decode=True, batch_size=2, max_length=9)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(other, state)
    same(other(X[:, 4:])[0], view(X[:, 4:])[0])


def test_metadata():
    module = make(
        sinks=True,
        qk_ln=True,
        kernel_metadata={name: {"tag": name} for name in ("query", "out", "q_ln", "sinks")},
        bias_metadata={"key": {"tag": "bias"}},
    )
    tags = [module.query.kernel, module.out.kernel, module.q_ln.scale, module.sinks, module.key.bias]
    assert [x.get_metadata()["tag"] for x in tags] == ["query", "out", "q_ln", "sinks", "bias"]
    assert "tag" not in module.key.kernel.get_metadata()


def test_sharding_of_parameters_and_caches(mode):
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        sharded = lambda *axes: {"out_sharding": axes}
        module = make(
            cache_dtype="int8",
            kernel_metadata=dict(query=sharded(None, "model", None), out=sharded("model", None, None)),
            cache_sharding=("data", None, "model", None),
        )
        assert module.query.kernel[...].sharding.spec == jax.P(None, "model", None)
        view = nnx.view(module, decode=True, batch_size=2, max_length=9)
        axes = lambda x: x.get_metadata()["out_sharding"]
        assert axes(view.cached_key) == ("data", None, "model", None)
        assert axes(view.cached_key_scale) == ("data", None, "model")
        assert axes(view.cache_index) == ("data",)
        np.testing.assert_allclose(nnx.jit(lambda m: m(X)[0])(view), module(X)[0], atol=0.05)


# -- views and caches -------------------------------------------------------------------------------------------------


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


# -- training ---------------------------------------------------------------------------------------------------------


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


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    wrong, message = MISTAKES[name]
    with pytest.raises(ValueError, match=r"(?s)" + message):
        wrong()


def test_the_bridge_is_refused_in_tree_mode_where_it_would_lose_the_cache():
    out, full = through_the_bridge(tree=False)
    np.testing.assert_allclose(out, full, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"ToNNX loses a cache.*Use the modules of mqa_jax.nnx"):
        through_the_bridge(tree=True)
