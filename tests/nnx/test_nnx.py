"""The modules of `mqa_jax.nnx`: beside those of linen to the last bit, and what only NNX has.

What Flax's tests check of `nnx.MultiHeadAttention` (`tests/nnx/nn/attention_test.py`), and where it is checked of ours:

    basic, multihead_dot_product_attention    test_modules.py, on every skin
    sow attention weights                     does not apply: `needs_weights=True` returns them
    autoregressive decoding against a pass    tests/cache, on every skin
    init_cache missing, decode missing        MISTAKES
    qk norm                                   test_modules.py::test_norms, on every skin
    causal mask equal to is_causal            test_nnx_state.py::test_a_causal_mask_is_what_causal_is
    num_kv_heads, of which some do not divide test_modules.py, test_module_errors.py
    equivalence with linen                    test_the_same_bits
    keep_rngs, rngs of a call                 test_nnx_state.py::test_dropout_*
    kernel_metadata, ln metadata              test_metadata
    nnx.view, view_info                       test_nnx_state.py::test_view*
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
import orbax.checkpoint as ocp
import pytest
import skins
import test_cache_errors
import test_module_errors
from flax import nnx
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


# -- beside linen ------------------------------------------------------------------------------------------------------


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


# -- parameters --------------------------------------------------------------------------------------------------------


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


# -- mistakes ----------------------------------------------------------------------------------------------------------


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
