"""Names, shapes and dtypes of the arrays of a cache; what they mean is in `mqa_jax.cache`."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from mqa_jax import quantization
from mqa_jax.checks import DTYPES

KEY, VALUE, INDEX, RING_INDEX = "cached_key", "cached_value", "cache_index", "ring_index"
KEY_SCALE, VALUE_SCALE = "cached_key_scale", "cached_value_scale"
CONTENTS = KEY, VALUE, KEY_SCALE, VALUE_SCALE
NAMES = *CONTENTS, INDEX, RING_INDEX
OTHER_CALLS = "other_calls"

LAYOUTS = "static", "ring"
READ_IN_PLACE = 16  # new tokens at most, for which a ring has room beside its window


def new_cache(
    batch: int, length: int, kv_heads: int, head_dim: int, dtype: DTypeLike, index: str = INDEX
) -> dict[str, Array]:
    """An empty cache for one attention module; `index` is INDEX or RING_INDEX."""
    for x in (batch, length):
        if isinstance(x, bool) or not isinstance(x, int | np.integer) or x < 1:
            raise ValueError(
                "A cache needs at least one row and one position, both integers: "
                f"batch={batch!r}, max_length={length!r}."
            )
    check_dtype(dtype)
    shape = batch, length, kv_heads, head_dim
    cache = {KEY: jnp.zeros(shape, dtype), VALUE: jnp.zeros(shape, dtype), index: jnp.zeros(batch, jnp.int32)}
    if quantization.is_quantized(dtype):
        cache |= {name: jnp.zeros(shape[:-1], jnp.float32) for name in (KEY_SCALE, VALUE_SCALE)}
    return cache


def check_dtype(dtype: DTypeLike) -> None:
    names = [jnp.dtype(known).name for known in (*DTYPES, *quantization.DTYPES)]
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in names:
        raise ValueError(f"Keys and values are cached as one of {names}: dtype={name}.")


def check_format(cache: Mapping[str, Array]) -> None:
    """Whether these are the arrays of one attention module; a cache may come from anywhere."""
    check_dtype(cache[KEY].dtype)
    shapes = {name: jnp.shape(x) for name, x in cache.items()}
    key, index = shapes[KEY], [name for name in (INDEX, RING_INDEX) if name in cache]
    scales = {KEY_SCALE, VALUE_SCALE} if quantization.is_quantized(cache[KEY].dtype) else set()
    expected = {KEY: key, VALUE: key, **dict.fromkeys(scales, key[:-1]), **dict.fromkeys(index, key[:1])}
    dtypes = {name: str(x.dtype) for name, x in cache.items()}
    right = len(key) == 4 and len(index) == 1 and shapes == expected and dtypes[KEY] == dtypes[VALUE]
    if not right or {dtypes[name] for name in index} != {"int32"}:
        raise ValueError(
            f"This is no cache of an attention module (mqa_jax.cache shows what one looks like): shapes={shapes}, "
            f"dtypes={dtypes}. Make it with init_cache."
        )


def ring_slots(window_left: int) -> int:
    """How many slots a ring buffer has for queries that see themselves and so many tokens before."""
    return window_left + READ_IN_PLACE


def index_of(cache: Mapping[str, Array]) -> Int[Array, " B"]:
    """The next position of each row."""
    return cache[RING_INDEX if RING_INDEX in cache else INDEX]
