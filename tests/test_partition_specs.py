"""How mesh axes cut the arrays of attention modules: by names, stacked or not, in linen and NNX, and nothing else."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
import wrong_calls
from flax import nnx
from jax.sharding import PartitionSpec as P

import mqa_jax
from mqa_jax import nnx as mqa_nnx

AXES: dict[str, Any] = dict(batch="b", heads="n", kv_heads="k", embed="d", sequence="s")
RNG = jax.random.key(0)
X = jax.ShapeDtypeStruct((2, 5, 48), jnp.float32)
PROJECTIONS = {
    "query": {"kernel": P("d", "n", None), "bias": P("n", None)},
    "key": {"kernel": P("d", "k", None), "bias": P("k", None)},
    "value": {"kernel": P("d", "k", None), "bias": P("k", None)},
    "out": {"kernel": P("n", None, "d"), "bias": P("d")},
}
KERNELS = {name: {"kernel": layer["kernel"]} for name, layer in PROJECTIONS.items()}
NORMS = {"q_ln": {"scale": P("n"), "bias": P("n")}, "k_ln": {"scale": P("k"), "bias": P("k")}}
SHARED_NORMS = {name: dict.fromkeys(("scale", "bias"), P(None)) for name in NORMS}
CACHE = {"cached_key": P("b", "s", "k", None), "cached_value": P("b", "s", "k", None), "cache_index": P("b")}
SCALES = dict.fromkeys(("cached_key_scale", "cached_value_scale"), P("b", "s", "k"))
RING = {"cached_key": P("b", None, "k", None), "cached_value": P("b", None, "k", None), "ring_index": P("b")}

# Settings of GroupedQueryAttention(48, 6, kv_heads=3), and the specs of its parameters.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, PROJECTIONS),
    "no biases": (dict(use_bias=False), KERNELS),
    "bias of the output alone": (
        dict(use_bias=False, use_out_bias=True),
        KERNELS | {"out": PROJECTIONS["out"]},
    ),
    "no output": (dict(output_projection=False), {k: x for k, x in PROJECTIONS.items() if k != "out"}),
    "neither": (
        dict(output_projection=False, use_bias=False),
        {k: x for k, x in KERNELS.items() if k != "out"},
    ),
    "neither, and as many key/value heads": (
        dict(output_projection=False, use_bias=False, kv_heads=6),
        {k: x for k, x in KERNELS.items() if k != "out"},
    ),
    "neither, as many key/value heads, other features, sinks": (
        dict(output_projection=False, use_bias=False, kv_heads=6, head_dim=7, sinks=True),
        {k: x for k, x in KERNELS.items() if k != "out"} | {"sinks": P("n")},
    ),
    "norms": (dict(qk_ln=True), PROJECTIONS | NORMS),
    "norms without bias": (
        dict(qk_ln=True, norm_type="rmsnorm"),
        PROJECTIONS | {name: {"scale": norm["scale"]} for name, norm in NORMS.items()},
    ),
    "one norm for all heads": (dict(qk_gn=True), PROJECTIONS | SHARED_NORMS),
    "one key/value head": (
        dict(kv_heads=1, qk_ln=True),
        PROJECTIONS | {"q_ln": NORMS["q_ln"], "k_ln": SHARED_NORMS["k_ln"]},
    ),
    "sinks": (dict(sinks=True), PROJECTIONS | {"sinks": P("n")}),
    "learned key and value": (dict(add_bias_kv=True), PROJECTIONS | dict.fromkeys(("bias_k", "bias_v"), P("k", None))),
    "other width": (dict(out_features=20, head_dim=7), PROJECTIONS),
}


def settings(**more):
    return dict(dim=48, heads=6, kv_heads=3) | more


def stacked(specs, axes=1):
    return jax.tree.map(lambda spec: P(*[None] * axes, *spec), specs)


def specs_of(variables: Any, **axes: Any) -> Any:
    return mqa_jax.partition_specs(variables, **(axes or AXES))


def of_nnx(model, *filters):
    """Without the variables around them."""
    return nnx.to_pure_dict(specs_of(nnx.state(model, *filters)))


@pytest.mark.parametrize(("chosen", "expected"), SETTINGS.values(), ids=SETTINGS)
def test_parameters(chosen, expected):
    linen = mqa_jax.GroupedQueryAttention(**settings(**chosen))
    assert specs_of(jax.eval_shape(linen.init, RNG, X)) == {"params": expected}
    model = lambda: mqa_nnx.GroupedQueryAttention(**settings(**chosen), rngs=nnx.Rngs(0))
    assert of_nnx(nnx.eval_shape(model)) == expected


CACHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "static": ({}, CACHE),
    "8 bits": (dict(cache_dtype="int8"), CACHE | SCALES),
    "ring": (dict(cache_layout="ring", local_window_size=(3, 0)), RING),
    "ring of 8 bits": (
        dict(cache_layout="ring", local_window_size=(3, 0), cache_dtype="int8"),
        RING | dict.fromkeys(SCALES, P("b", None, "k")),
    ),
}


@pytest.mark.parametrize(("chosen", "expected"), CACHES.values(), ids=CACHES)
def test_caches(chosen, expected):
    cache = mqa_jax.GroupedQueryAttention(**settings(**chosen)).init_cache(2, 11)
    assert specs_of({"cache": {"layer": cache}}) == {"cache": {"layer": expected}}
    model = mqa_nnx.GroupedQueryAttention(**settings(**chosen), rngs=nnx.Rngs(0))
    model.init_cache(2, 11, calls=2)
    both = expected | {"other_calls": {0: expected}}
    assert of_nnx(model, nnx.Cache) == both
    assert of_nnx(model) == PROJECTIONS | both


class Block(nn.Module):
    """With what is not attention, and what has its names without being it."""

    @nn.compact
    def __call__(self, x, _):
        x = x + mqa_jax.GroupedQueryAttention(**settings(), name="attention")(nn.LayerNorm()(x))[0]
        x = x + nn.MultiHeadDotProductAttention(6, name="of_flax", qkv_features=48)(x)
        for name in ("query", "key", "value", "out"):
            x = nn.Dense(48, name=name)(x)
        return x, None


def test_stacked_layers_and_what_is_not_attention():
    """Dense layers of the same names, stacked, have kernels of three axes as well."""
    model = nn.scan(
        nn.scan(Block, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True}, length=2),
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        length=3,
    )()
    found = specs_of(jax.eval_shape(model.init, RNG, X, None))["params"]
    assert found["attention"] == found["of_flax"] == stacked(PROJECTIONS, 2)
    rest = {name: x for name, x in found.items() if name not in ("attention", "of_flax")}
    assert set(jax.tree.leaves(rest)) == {P()}
    cache = jax.eval_shape(lambda: mqa_jax.init_cache(model, 2, 11, X, None))
    assert specs_of(cache) == {"attention": stacked(CACHE, 2)}


def test_stacked_layers_of_nnx():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def layers(rngs):
        return mqa_nnx.GroupedQueryAttention(**settings(attn_pdrop=0.1), rngs=rngs)

    model = layers(nnx.Rngs(0))
    model.init_cache(2, 11)
    rngs = {"rngs": {"count": P(), "key": P()}}
    assert of_nnx(model) == stacked(PROJECTIONS | CACHE) | rngs


def test_trees_around_parameters():
    """Boxes with names, the state of an optimizer, gradients of NNX, a module at the root, and one of FlashMHA."""
    named = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "old", None))
    boxed = jax.eval_shape(mqa_jax.GroupedQueryAttention(**settings(kernel_init=named)).init, RNG, X)
    specs = specs_of(boxed)
    assert isinstance(specs["params"]["query"]["kernel"], nn.Partitioned)
    assert nn.unbox(specs) == {"params": PROJECTIONS}
    params = nn.unbox(boxed)["params"]
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    adam = specs_of((params, state))[1][0]
    assert (adam.count, adam.mu, adam.nu) == (P(), PROJECTIONS, PROJECTIONS)
    flash = jax.eval_shape(mqa_jax.FlashMHA(48, 6).init, RNG, X)
    assert specs_of(flash, heads=("x", "y"), kv_heads="n", embed="d")["params"]["out"]["kernel"] == P(
        ("x", "y"), None, "d"
    )


def test_axes_that_are_not_given_are_whole():
    variables = jax.eval_shape(mqa_jax.GroupedQueryAttention(**settings(qk_ln=True)).init, RNG, X)
    assert {name for spec in jax.tree.leaves(mqa_jax.partition_specs(variables)) for name in spec} == {None}


def kernels(shape, names=("query", "key", "value")):
    return {name: {"kernel": jnp.ones(shape)} for name in names}


def test_stacked_dense_layers_without_biases():
    """Their last one says that they are none of attention."""
    mixed = {"dense": kernels((3, 48, 48), ("query", "key", "value", "out")), "attention": kernels((48, 6, 8))}
    found = specs_of(mixed)
    assert set(jax.tree.leaves(found["dense"])) == {P()}
    assert found["attention"] == {name: KERNELS[name] for name in ("query", "key", "value")}


WRONG: dict[str, tuple[Any, str]] = {
    "no attention": (
        lambda: specs_of({"params": {"dense": {"kernel": jnp.ones((4, 4))}}}),
        r"holds no attention module.*query/kernel \[D, N, H\].*\['params/dense/kernel'\]\. Pass variables of linen",
    ),
    "layers stacked behind": (
        lambda: specs_of({"query": {"kernel": jnp.ones((48, 2, 6, 8))}, "out": {"kernel": jnp.ones((6, 2, 8, 48))}}),
        r"holds no attention module.*layers stacked along leading axes",
    ),
    "an array more": (
        lambda: specs_of({"query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4)), "lora": jnp.ones(3)}}),
        r"holds no array of this name: query/lora, shape=\(3,\)\. What a model adds.*scope, or an.*rest of the tree",
    ),
    "kernels alone": (
        lambda: specs_of({"layer": kernels((24, 48, 64))}),
        r"may be kernels.*\[layers, in, out\] .*D is not N \* H: layer/query/kernel, shape=\(24, 48, 64\)\. "
        r"Leave them out and write their specs: of attention PartitionSpec\(embed, heads, None\)",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_is_refused(case):
    wrong_calls.refused(ValueError, case)
