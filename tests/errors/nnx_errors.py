"""What goes wrong with NNX modules alone, and what each mistake is told."""

from typing import Any

import jax
import jax.numpy as jnp
import skins
from flax import nnx

import mqa_jax
from mqa_jax import linen as mqa_linen
from mqa_jax import nnx as mqa_nnx

X = jnp.ones((2, 7, 24))


def make(rngs: Any = None, **settings: Any) -> Any:
    settings = {"kv_heads": 2, "rope": mqa_jax.Rope(), **settings}
    return mqa_nnx.GroupedQueryAttention(24, 6, **settings, rngs=nnx.Rngs(0) if rngs is None else rngs)


def _assigned(change: Any) -> None:
    """In tree mode, under a transformation."""
    with skins.mode(tree=True):
        module = make()
        mqa_nnx.init_cache(module, 2, 9)
        nnx.jit(change)(module)


def _step_with_dropout() -> None:
    view = nnx.view(make(attn_pdrop=0.5, deterministic=False), decode=True, batch_size=2, max_length=9)
    step, cache = mqa_nnx.decoding_step(view)
    step(cache, X)


def _assign_key(module: Any) -> None:
    module.cached_key = nnx.Cache(module.cached_key[...] + 1)


MISTAKES: dict[str, Any] = {
    "no rngs": (lambda: mqa_nnx.GroupedQueryAttention(24, 6), r"from nnx.Rngs: rngs=None. Pass rngs=nnx.Rngs\(0\)"),
    "a key as rngs": (lambda: make(rngs=jax.random.key(0)), r"GroupedQueryAttention draws its parameters.*rngs=Array"),
    "no rngs of FlashMHA": (lambda: mqa_nnx.FlashMHA(24, 6), r"FlashMHA draws its parameters .*rngs=None"),
    "a number as rngs of a call": (
        lambda: make(attn_pdrop=0.5)(X, deterministic=False, rngs=3),
        r"rngs must be nnx.Rngs, a stream of it, or a key of jax.random: rngs=3",
    ),
    "no stream": (
        lambda: make(attn_pdrop=0.5, deterministic=False, keep_rngs=False)(X),
        r"keeps no stream of them.*Pass rngs=nnx.Rngs\(dropout=seed\) to the call",
    ),
    "no dropout decision": (
        lambda: make(attn_pdrop=0.5)(X),
        r"\"deterministic\" must be passed to the constructor or at call time, or to nnx.view",
    ),
    "decode without a cache": (
        lambda: nnx.view(make(), decode=True),
        r"decode=True needs a cache, and this module has none.*nnx.view\(model, decode=True, batch_size",
    ),
    "a cache without a length": (
        lambda: nnx.view(make(), decode=True, batch_size=2),
        r"needs decode=True, batch_size and max_length: decode=True, batch_size=2, max_length=None",
    ),
    "sizes without decode": (lambda: nnx.view(make(), batch_size=2, max_length=9), r"decode=None, batch_size=2"),
    "rows of a float": (lambda: nnx.view(make(), decode=True, batch_size=2.0, max_length=9), r"integers: batch=2.0"),
    "no calls": (lambda: mqa_nnx.init_cache(make(), 2, 9, calls=0), r"how often one step calls .*calls=0"),
    "a cache of another batch": (
        lambda: nnx.view(make(), decode=True, batch_size=3, max_length=9)(X),
        r"cache was made for another batch: x.shape=\(2, 7, 24\), cache .*=\(3, 9, 2, 4\)",
    ),
    "no attention": (lambda: mqa_nnx.init_cache(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 2, 9), r"no attention .*: Linear"),
    "nothing cached": (lambda: mqa_nnx.decoding_step(make()), r"holds no cache of an attention module"),
    "a cache in tree mode": (
        lambda: _assigned(lambda module: mqa_nnx.init_cache(module, 2, 8)),
        r"In tree mode an attribute that is assigned inside a transformation is lost after it: cached_key",
    ),
    "an attribute in tree mode": (
        lambda: _assigned(_assign_key),
        r"cached_key. Assign to the contents of its variable",
    ),
    "in_features": (
        lambda: make(causal=False)(X, inputs_k=X[..., :10]),
        r"inputs_k.shape=\(2, 7, 10\), in_kv_features=24. Pass in_kv_features=10 to the constructor",
    ),
    "in_features of values": (
        lambda: make(causal=False)(X, inputs_k=X, inputs_v=X[..., :10]),
        r"inputs_v.shape=\(2, 7, 10\), in_v_features=24. Pass in_v_features=10",
    ),
    "keys from x of other features": (lambda: make(in_kv_features=10)(X), r"x.shape=\(2, 7, 24\), in_kv_features=10"),
    "no keys": (
        lambda: make(key_value_projections=False)(X),
        r"key_value_projections=False: pass prev_layer_key_value",
    ),
    "dim missing": (lambda: mqa_nnx.GroupedQueryAttention(heads=6, rngs=nnx.Rngs(0)), r"needs dim .*: dim=0"),
    "metadata of all": (
        lambda: make(kernel_metadata={"out_sharding": (None, "model", None)}),
        r"kernel_metadata has an entry for each parameter, by its name: found \['out_sharding'\], expected .*'query'",
    ),
    "a step with dropout": (_step_with_dropout, r"no variable but the cache, .*\['rngs'\]\['count'\]"),
    "parameters of another": (
        lambda: mqa_nnx.to_nnx(make(), mqa_nnx.to_linen(make(sinks=True))),
        r"no parameters of GroupedQueryAttention: \[\('sinks', \(6,\)\)\] are in one of both only",
    ),
}


def through_the_bridge(tree: bool) -> Any:
    """Cached steps of a linen module in NNX, and the pass over the whole text."""
    with skins.mode(tree):
        module = nnx.bridge.ToNNX(mqa_linen.GroupedQueryAttention(24, 6), rngs=nnx.Rngs(0)).lazy_init(X)
        full = module(X)[0]
        module.init_cache(2, 9, mutable=["cache"])
        step = nnx.jit(lambda module, x: module(x, mutable=["cache"])[0])
        return jnp.concatenate([step(module, X[:, :4]), step(module, X[:, 4:])], 1), full
