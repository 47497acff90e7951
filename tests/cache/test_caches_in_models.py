"""Caches of whole models: wherever they are, and whatever a model does with its modules."""

import dataclasses
from typing import Any

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import MAX_LENGTH, RNG, X, close, full_pass, make, nearly_full, new_cache, step
from test_cache_transformations import Scanned

import mqa_jax

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare


# -- collections of any form -------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    layers: list


@pytest.mark.parametrize("around", [lambda c: [c, c], lambda c: (flax.core.freeze({"a": c}),), lambda c: State([c])])
def test_caches_are_found_wherever_they_are(around):
    module, params, cache = nearly_full()
    whole = around(cache)
    count = len(jax.tree.leaves(whole)) // 3
    assert mqa_jax.cache_bytes(whole) == count * mqa_jax.cache_bytes(cache)
    order, reset = np.array([1, 0, 2]), np.array([False, True, False])
    chex.assert_trees_all_equal(mqa_jax.reorder_cache(whole, order), around(mqa_jax.reorder_cache(cache, order)))
    chex.assert_trees_all_equal(mqa_jax.reset_cache(whole, reset), around(mqa_jax.reset_cache(cache, reset)))
    mqa_jax.check_cache(whole)
    _, full = step(module, params, cache, X[:, :2])
    with pytest.raises(ValueError, match="cache is full"):
        mqa_jax.check_cache(around(full))


@pytest.mark.linen
def test_layers_beside_stacked_layers():
    """Each keeps its own batch axis, and arrays of other modules go along."""
    first, cache = new_cache(make()[0]), mqa_jax.init_cache(Scanned(), 3, MAX_LENGTH, X)
    fill = lambda tree: jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=jnp.int32).reshape(x.shape).astype(x.dtype), tree
    )
    mixed = fill({"first": first, **cache, "other": {"state": jnp.zeros((4, 3, 2))}})
    taken = mqa_jax.reorder_cache(mixed, np.array([2, 0, 0]), batch_axis=1)
    order = np.array([2, 0, 0])
    chex.assert_trees_all_equal(taken["first"], jax.tree.map(lambda x: x[order], mixed["first"]))
    for name in ("layers", "other"):
        chex.assert_trees_all_equal(taken[name], jax.tree.map(lambda x: x[:, order], mixed[name]))


# -- what a model may do with its modules ------------------------------------------------------------------------------


class Shared(nn.Module):
    """Two modules, each called twice a step, as ALBERT's layers are."""

    kind: str
    layout: str = "static"

    def setup(self):
        makers: dict[str, Any] = {"remat": nn.remat, "jit": nn.jit, "plain": lambda kind: kind}
        make = makers[self.kind](mqa_jax.GroupedQueryAttention)
        settings = dict(kv_heads=2, rope=mqa_jax.Rope(), cache_layout=self.layout, local_window_size=(6, 0))
        self.layers = [make(24, 6, **settings) for _ in range(2)]

    def __call__(self, x):
        for layer in (*self.layers, *self.layers, self.layers[0]):
            x = x + layer(x)[0]
        return x

    def two_steps(self, x):
        return jnp.concatenate([self(x[:, :1]), self(x[:, 1:])], 1)


@pytest.mark.linen
@pytest.mark.parametrize(("kind", "layout"), [("plain", "static"), ("remat", "ring"), ("jit", "static")])
def test_a_module_that_a_step_calls_several_times(kind, layout):
    model = Shared(kind, layout)
    params = model.init(RNG, X)["params"]
    cache = mqa_jax.init_cache(model, 3, MAX_LENGTH, X)
    assert [len(cache[f"layers_{i}"]["other_calls"]) for i in range(2)] == [2, 1]
    assert mqa_jax.cache_bytes(cache) == 5 * mqa_jax.cache_bytes(
        {k: v for k, v in cache["layers_0"].items() if k != "other_calls"}
    )
    apply = jax.jit(
        lambda cache, x, method=None: model.apply(
            {"params": params, "cache": cache}, x, mutable=["cache"], method=method
        ),
        static_argnames="method",
    )
    full = model.apply({"params": params}, X)
    first, state = apply(cache, X[:, :4])
    cache = mqa_jax.reorder_cache(state["cache"], np.array([1, 0, 2]))
    again, state = apply(cache, X[jnp.array([1, 0, 2]), 4:6], method="two_steps")
    last, _ = apply(mqa_jax.reorder_cache(state["cache"], np.array([1, 0, 2])), X[:, 6:])
    close(jnp.concatenate([first, again[jnp.array([1, 0, 2])], last], 1), full)


class Flags(nn.Module):
    """What models take beside arrays: flags, words, nothing, numbers that are shapes."""

    @nn.compact
    def __call__(self, x, train, mode, nothing=None, *, copies, flags):
        assert train is False
        assert (mode, nothing, copies, flags["deep"]) == ("greedy", None, 2, (True,))
        return jnp.concatenate([mqa_jax.GroupedQueryAttention(24, 6)(x)[0]] * copies)


@pytest.mark.linen
def test_what_is_no_array_reaches_the_model_as_it_is():
    x = jax.ShapeDtypeStruct((3, 2, 24), jnp.float32)
    cache = mqa_jax.init_cache(Flags(), 3, MAX_LENGTH, x, False, "greedy", None, copies=2, flags={"deep": (True,)})
    assert cache["GroupedQueryAttention_0"]["cached_key"].shape == (3, MAX_LENGTH, 6, 4)


@pytest.mark.linen
def test_cross_attention_gets_no_cache():
    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, x, context):
            x = x + mqa_jax.GroupedQueryAttention(24, 6, name="own")(x)[0]
            return x + mqa_jax.GroupedQueryAttention(24, 6, causal=False, name="cross")(x, inputs_k=context)[0]

    context = X[:, :5, :10]
    params = Decoder().init(RNG, X, context)["params"]
    cache = mqa_jax.init_cache(Decoder(), 3, MAX_LENGTH, X, context)
    assert set(cache) == {"own"}
    apply = lambda cache, x: Decoder().apply({"params": params, "cache": cache}, x, context, mutable=["cache"])
    first, state = apply(cache, X[:, :6])
    second, _ = apply(state["cache"], X[:, 6:])
    close(jnp.concatenate([first, second], 1), Decoder().apply({"params": params}, X, context))


@pytest.mark.linen
def test_a_model_of_which_a_layer_has_no_cache_is_refused():
    model = Shared("plain")
    params = model.init(RNG, X)["params"]
    cache = mqa_jax.init_cache(model, 3, MAX_LENGTH, X)
    message = r"no cache for this module: path=\('layers_1',\), the collection has \['layers_0'\]"
    with pytest.raises(ValueError, match=message):
        model.apply({"params": params, "cache": {"layers_0": cache["layers_0"]}}, X, mutable=["cache"])


@pytest.mark.linen
def test_a_bound_module_goes_on_from_call_to_call():
    module, params = make()
    bound = module.bind({"params": params, "cache": new_cache(module)}, mutable=["cache"])
    out = [bound(X[:, i : i + 2])[0] for i in (0, 2, 4)]
    close(jnp.concatenate(out, 1), full_pass(module, params, X[:, :6]))


def test_beam_search_finds_what_trying_everything_finds():
    """With as many beams as there are texts: the cache follows the rows as they are reordered."""
    vocabulary, length = 3, 3
    table = jax.random.normal(RNG, (vocabulary, 24))
    module, params = make(rope=mqa_jax.Rope())
    head = jax.random.normal(jax.random.key(7), (24, vocabulary)) * 3
    scores = lambda out: jax.nn.log_softmax(out @ head)
    texts = np.stack(np.meshgrid(*[np.arange(vocabulary)] * length, indexing="ij"), -1).reshape(-1, length)
    every = jnp.asarray(np.concatenate([np.zeros((len(texts), 1), int), texts], 1))
    logits = scores(module.apply({"params": params}, table[every[:, :-1]])[0])
    total = jnp.take_along_axis(logits, every[:, 1:, None], 2)[..., 0].sum(1)
    best = texts[int(total.argmax())]

    beams = vocabulary**2
    cache, rows, sums = new_cache(module, batch=beams), np.zeros((beams, 1), int), np.full(beams, -np.inf)
    sums[0] = 0.0
    for _ in range(length):
        out, cache = step(module, params, cache, table[rows[:, -1:]])
        candidates = sums[:, None] + np.asarray(scores(out[:, 0]))
        chosen = np.argsort(-candidates, axis=None)[:beams]
        beam, token = np.unravel_index(chosen, candidates.shape)
        cache, sums = mqa_jax.reorder_cache(cache, beam), candidates[beam, token]
        rows = np.concatenate([rows[beam], token[:, None]], 1)
    np.testing.assert_array_equal(rows[0, 1:], best)
    close(sums[0], total.max())
