"""What caches, and modules with one, refuse."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_calls import RNG, layer, ones, refused

import mqa_jax


def cached(module=None, max_length=8, **options):
    """A module that is given 5 tokens and has room for max_length."""
    module = layer() if module is None else module
    x = ones((2, 5, 16))
    params = module.init(RNG, x)["params"]
    cache = options.pop("cache", None) or mqa_jax.init_cache(module, 2, max_length, x)
    mutable = options.pop("mutable", ["cache"])
    return module.apply({"params": params, "cache": cache}, options.pop("x", x), mutable=mutable, **options)


def changed(**arrays):
    """The cache of a module with other arrays, None for none."""
    cache = {**layer().init_cache(2, 8), **arrays}
    return {name: x for name, x in cache.items() if x is not None}


STACKED = {"layers": jax.tree.map(lambda x: jnp.stack([x] * 3), layer().init_cache(2, 8))}
CACHE = {
    "overflow": (
        lambda: cached(max_length=4),
        r"cache is full: cache_index=\[5 5\] after this call, max_length=4. Make a longer cache .* reset_cache",
    ),
    "batch": (lambda: cached(x=ones((3, 5, 16))), r"another batch: x.shape=\(3, 5, 16\), cache .*=\(2, 8, 4, 4\)"),
    "heads": (
        lambda: cached(cache=layer(kv_heads=2).init_cache(2, 8)),
        r"New keys must fit the cache .*=\(2, 8, 2, 4\): key.shape=\(2, 5, 4, 4\)",
    ),
    "rank": (lambda: cached(x=ones((5, 16))), r"With a cache x must be \[batch, T, D\]: x.shape=\(5, 16\)"),
    "inputs_k too": (lambda: cached(inputs_k=ones((2, 5, 16))), r"got a cache and inputs_k"),
    "empty": (lambda: layer().init_cache(0, 8), r"one row and one position, both integers: batch=0, max_length=8"),
    "batch of a float": (lambda: layer().init_cache(2.0, 8), r"both integers: batch=2.0, max_length=8"),
    "length of a flag": (lambda: layer().init_cache(2, True), r"both integers: batch=2, max_length=True"),
    "no attention": (
        lambda: mqa_jax.init_cache(nn.Dense(3), 2, 8, ones((2, 5))),
        r"holds no attention module of mqa_jax: Dense",
    ),
    "layout": (lambda: layer(cache_layout="paged"), r"Unknown cache_layout='paged': use one of \('static', 'ring'\)"),
    "ring without a window": (
        lambda: layer(cache_layout="ring"),
        r"cache_layout='ring' needs local_window_size, local_window_size=None. Or use cache_layout='static'",
    ),
    "dtype": (
        lambda: layer(cache_dtype="float8_e5m2"),
        r"cached as one of \['float32', .*'float8_e4m3fn'\]: dtype=float8_e5m2",
    ),
    "dtype of init_cache": (lambda: layer().init_cache(2, 8, dtype=jnp.int4), r"cached as one of .*: dtype=int4"),
    "another window": (
        lambda: cached(
            layer(local_window_size=9), cache=layer(cache_layout="ring", local_window_size=3).init_cache(2, 8)
        ),
        r"local_window_size=\(9, 9\), slots=19. Make the cache with this module's init_cache",
    ),
    "short mask for a ring": (
        lambda: cached(layer(cache_layout="ring", local_window_size=3), mask=ones((2, 4), bool)),
        r"column for each position.*positions=\[5 5\] after this call, columns=4. Make it longer",
    ),
    "not mutable": (lambda: cached(mutable=[]), r"cannot be written: pass mutable=\['cache'\] to apply"),
    "another module's": (
        lambda: cached(cache={"attention": layer().init_cache(2, 8)}),
        r"no cache for this module: path=\(\), the collection has \['attention'\]. Make it with mqa_jax.init_cache",
    ),
    "no values": (lambda: cached(cache=changed(cached_value=None)), r"no cache of an attention module .*init_cache"),
    "no scales": (
        lambda: cached(cache={name: x for name, x in layer().init_cache(2, 8, "int8").items() if "scale" not in name}),
        r"no cache of an attention module .*'cached_key': 'int8'",
    ),
    "two indices": (lambda: cached(cache=changed(ring_index=ones(2, int))), r"no cache .*'ring_index': \(2,\)"),
    "one index": (lambda: cached(cache=changed(cache_index=jnp.int32(0))), r"no cache .*'cache_index': \(\)"),
    "index dtype": (lambda: cached(cache=changed(cache_index=ones(2))), r"no cache .*'cache_index': 'float32'"),
    "cached integers": (
        lambda: cached(cache=changed(cached_key=ones((2, 8, 4, 4), int))),
        r"cached as one of .*: dtype=int32",
    ),
    "spoiled": (
        lambda: cached(cache=changed(cache_index=-ones(2, int))),
        r"worthless: cache_index=\[-1 -1\].*reset_cache",
    ),
    "unknown dtype": (lambda: layer(cache_dtype="floaty"), r"cached as one of .*: dtype='floaty'"),
    "columns of a mask": (
        lambda: cached(mask=ones((2, 5), bool)),
        r"static cache mask has a column for each of its positions: mask.shape=\(2, 1, 1, 5\), max_length=8. Pad it",
    ),
    "rows of a table": (
        lambda: (
            cached(layer(cache_layout="ring", local_window_size=3), x=ones((2, 3, 16)), bias=ones((1, 4, 5, 9)))[1]
            and cached(
                cache=changed(cache_index=np.array([4, 0], np.int32)), x=ones((2, 3, 16)), bias=ones((1, 4, 5, 9))
            )
        ),
        r"one for each position.*positions=\[7 3\] after this call, rows=5. Make it longer",
    ),
    "stacked": (
        lambda: mqa_jax.reorder_cache(STACKED, np.array([1, 0])),
        r"Layers are stacked .*cache_index'\]\": \(3, 2\).*batch_axis=None. It is 1 where nn.scan has",
    ),
    "stacked, another axis": (lambda: mqa_jax.reset_cache(STACKED, ones(2, bool), batch_axis=2), r"batch_axis=2"),
    "stacked, the layers": (
        lambda: mqa_jax.reorder_cache(STACKED, np.array([1, 0]), batch_axis=0),
        r"rows must be integer \[batch\].*rows.shape=\(2,\), batch=3",
    ),
    "reorder: outside": (
        lambda: mqa_jax.reorder_cache(changed(), np.array([0, 2])),
        r"rows of the cache, 0 to 1: rows=\[0 2\]",
    ),
    "reorder: negative": (lambda: mqa_jax.reorder_cache(changed(), np.array([0, -1])), r"rows=\[ 0 -1\]"),
    "reorder: bool": (lambda: mqa_jax.reorder_cache(changed(), ones(2, bool)), r"rows must be integer .*dtype=bool"),
    "reorder: axes": (lambda: mqa_jax.reorder_cache(changed(), ones((2, 1), int)), r"rows.shape=\(2, 1\), batch=2"),
    "reorder: length": (lambda: mqa_jax.reorder_cache(changed(), np.array([0, 1, 1])), r"rows.shape=\(3,\), batch=2"),
    "reset: length": (lambda: mqa_jax.reset_cache(changed(), ones(1, bool)), r"rows.shape=\(1,\), batch=2"),
    "reset: others": (
        lambda: mqa_jax.reset_cache({"a": changed(), "b": {"state": ones((2, 3))}}, ones(2, bool)),
        r"How \['b'\]\['state'\] starts anew is not known here.*shape=\(2, 3\)",
    ),
    "reorder: others": (
        lambda: mqa_jax.reorder_cache({"a": changed(), "step": jnp.int32(1)}, np.array([1, 0])),
        r"\['step'\] is no array of an attention module, and its batch axis is not found: shape=\(\), batch=2",
    ),
    "two batches": (
        lambda: mqa_jax.reorder_cache([changed(), layer().init_cache(3, 8)], np.array([1, 0])),
        r"caches of one batch have the same rows: rows=.*: 2.*: 3",
    ),
    "no cache in it": (lambda: mqa_jax.cache_bytes({"params": ones(3)}), r"no cache of an attention module.*params"),
    "check": (
        lambda: mqa_jax.check_cache([changed(cache_index=np.array([0, 9], np.int32))]),
        r"cache_index=\[0 9\].*max_length=8",
    ),
    "reset": (lambda: mqa_jax.reset_cache({}, np.array([0, 1])), r"rows must be bool \[batch\].*rows.dtype=int"),
}


@pytest.mark.parametrize("name", CACHE)
def test_wrong_calls(name):
    refused(ValueError, CACHE[name])


NOT_POSSIBLE: dict[str, Any] = {
    "ring: weights": (
        lambda: cached(layer(cache_layout="ring", local_window_size=3), needs_weights=True),
        r"which a ring buffer has not: cache_layout='ring'. Use cache_layout='static'",
    ),
}


@pytest.mark.parametrize("name", NOT_POSSIBLE)
def test_what_a_cache_cannot_do(name):
    refused(NotImplementedError, NOT_POSSIBLE[name])
