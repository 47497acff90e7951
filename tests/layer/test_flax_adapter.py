"""`attention_fn` inside Flax's own modules, linen and NNX, and our modules inside NNX."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

import mqa_jax
from mqa_jax import attention

RNG = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 7, 24))
close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Counts calls of our function, so that no test passes because Flax computed it itself."""
    count, choose = [], attention.choose

    def counted(implementation, inputs):
        count.append(1)
        return choose(implementation, inputs)

    monkeypatch.setattr(attention, "choose", counted)
    return count


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal mask": dict(mask=nn.make_causal_mask(X[..., 0])),
    "padding mask": dict(mask=jnp.broadcast_to(jnp.arange(7) < jnp.array([3, 7])[:, None, None, None], (2, 1, 7, 7))),
}


@pytest.mark.parametrize("name", CALLS)
def test_linen(name, calls):
    layers = [
        nn.MultiHeadDotProductAttention(num_heads=6, attention_fn=f)
        for f in (nn.dot_product_attention, mqa_jax.attention_fn)
    ]
    params = layers[0].init(RNG, X)
    flax, ours = (layer.apply(params, X, **CALLS[name]) for layer in layers)
    close(ours, flax)
    assert len(calls) == 1


def test_linen_decoding(calls):
    """Flax's own cache with our attention."""
    layer = nn.MultiHeadDotProductAttention(num_heads=6, decode=True, attention_fn=mqa_jax.attention_fn)
    variables = layer.init(RNG, X)
    outputs, cache = [], variables["cache"]
    for i in range(7):
        out, changed = layer.apply({"params": variables["params"], "cache": cache}, X[:, i : i + 1], mutable=["cache"])
        cache = changed["cache"]
        outputs.append(out)
    full = nn.MultiHeadDotProductAttention(num_heads=6).apply(
        {"params": variables["params"]}, X, mask=nn.make_causal_mask(X[..., 0])
    )
    close(jnp.concatenate(outputs, 1), full)
    assert len(calls) == 8  # init, and each step


def test_linen_dropout(calls):
    layer: Any = nn.MultiHeadDotProductAttention(
        num_heads=6, attention_fn=mqa_jax.attention_fn, dropout_rate=0.5, broadcast_dropout=False
    )
    params = layer.init(RNG, X, deterministic=True)
    drop = lambda seed: layer.apply(params, X, deterministic=False, rngs={"dropout": jax.random.key(seed)})
    np.testing.assert_array_equal(drop(0), drop(0))
    assert np.abs(drop(0) - drop(1)).max() > 1e-3
    plain = nn.MultiHeadDotProductAttention(num_heads=6).apply(params, X)
    close(layer.apply(params, X, deterministic=True), plain)


def test_half_precision(calls):
    layer: Any = nn.MultiHeadDotProductAttention(num_heads=6, attention_fn=mqa_jax.attention_fn, dtype=jnp.bfloat16)
    out = layer.apply(layer.init(RNG, X), X)
    assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CALLS)
def test_nnx(name, calls):
    def layer(**settings):
        return nnx.MultiHeadAttention(6, 24, rngs=nnx.Rngs(0), decode=False, **settings)

    flax, ours = layer()(X, **CALLS[name]), layer(attention_fn=mqa_jax.attention_fn)(X, **CALLS[name])
    close(ours, flax)
    assert len(calls) == 1


# -- our modules in NNX code ------------------------------------------------------------------------------------------


class Block(nnx.Module):
    """A block of an NNX model that holds one of our modules."""

    def __init__(self, rngs: nnx.Rngs):
        attention = mqa_jax.GroupedQueryAttention(24, 6, kv_heads=2, rope=mqa_jax.Rope())
        self.attention = bridge.ToNNX(attention, rngs=rngs).lazy_init(X)
        self.dense = nnx.Linear(24, 24, rngs=rngs)

    def __call__(self, x, **options):
        attended, _, _ = self.attention(x, **options)
        return self.dense(x + attended)


def test_nnx_bridge_trains():
    block = Block(nnx.Rngs(0))
    loss = lambda block: jnp.mean(block(X) ** 2)
    gradients = nnx.grad(loss)(block)
    assert gradients["attention"]["query"]["kernel"].shape == (24, 6, 4)
    step = nnx.jit(
        lambda block: jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(block, nnx.Param), nnx.grad(loss)(block))
    )
    before = loss(block)
    nnx.update(block, step(block))
    assert loss(block) < before


def test_nnx_bridge_caches():
    block = Block(nnx.Rngs(0))
    full = block(X)
    block.attention.init_cache(2, 9, mutable=["cache"])
    outputs = [block(X[:, start:stop], mutable=["cache"]) for start, stop in ((0, 4), (4, 5), (5, 7))]
    close(jnp.concatenate(outputs, 1), full)
    with pytest.raises(ValueError, match="cache is full"):
        block(X, mutable=["cache"])


def test_nnx_bridge_caches_under_jit():
    block = Block(nnx.Rngs(0))
    full = block(X)
    block.attention.init_cache(2, 9, mutable=["cache"])
    step = nnx.jit(lambda block, x: block(x, mutable=["cache"]))
    close(jnp.concatenate([step(block, X[:, i : i + 1]) for i in range(7)], 1), full)
