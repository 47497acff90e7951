"""The layouts of Flax's mutable `cache` collection, and how the cache of a whole model is made.

    cached_key          [batch, length, kv_heads, head_dim]    after norm and RoPE
    cached_value        [batch, length, kv_heads, head_dim]
    cached_key_scale    float32 [batch, length, kv_heads]      where keys are in 8 bits (`mqa_jax.quantization`)
    cached_value_scale  float32 [batch, length, kv_heads]
    cache_index         int32 [batch]                          tokens written so far, which is the next position
    ring_index          int32 [batch]                          the same of a ring buffer, instead of cache_index
    other_calls         a tuple of such caches                 where one step calls the module more than once

The names are Flax's, where it has one. Rows are independent: each has its own index, so rows of one batch may be at
different positions. The index of a row is -1 once something went in that cannot be right and that nobody could refuse
under `jit`: more tokens than there were, a row of another batch. What such a row gives is NaN until it is reset.

A static cache has a place for each position up to `length`, and is full after that. A ring buffer is for a window: it
holds the latest tokens alone, position p in slot p modulo `length`, and any number of tokens goes through it (2**31).

A module that a model calls several times in one step, as ALBERT and Zamba do, needs a cache for each of these calls.
They stand in a queue: each call takes the first and puts it at the end, so the next step finds them in the same order.

`mqa_jax.cache_append` writes to all of these, `mqa_jax.cache_rows` reorders and resets their rows.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
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


class Wanted(NamedTuple):
    """What `init_cache` asks every attention module for that is traced while it runs."""

    batch: int
    max_length: int
    dtype: Any


_wanted = jax.make_user_context(None)  # of which JAX knows that traced programs depend on it, those of nn.jit too


def wanted() -> Wanted | None:
    return _wanted.value


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
            f"This is no cache of an attention module (mqa_jax.kv_cache shows what one looks like): shapes={shapes}, "
            f"dtypes={dtypes}. Make it with init_cache."
        )


def ring_slots(window_left: int) -> int:
    """How many slots a ring buffer has for queries that see themselves and so many tokens before."""
    return window_left + READ_IN_PLACE


def index_of(cache: Mapping[str, Array]) -> Int[Array, " B"]:
    """The next position of each row."""
    return cache[RING_INDEX if RING_INDEX in cache else INDEX]


def init_cache(
    model: nn.Module, batch: int, max_length: int, *args: Any, dtype: DTypeLike | None = None, **kwargs: Any
) -> dict[str, Any]:
    """An empty `cache` collection for every attention module in a model. Nothing is run, only shapes are traced.

    Args:
      model: any `flax.linen` module; its attention modules may be nested, scanned over layers or rematerialised. One
        that the model calls several times gets a cache for each call. Cross-attention gets none.
      batch: rows.
      max_length: positions of each row. Ring buffers take any number: they have as many slots as their windows need.
      *args: sample inputs of the model, as for `model.init`; `jax.ShapeDtypeStruct`s will do for arrays. Whatever is
        no array, such as a flag `train`, reaches the model as it is.
      dtype: of the cached keys and values: a float dtype, "int8" or "float8_e4m3fn". Default: each module's
        `cache_dtype`, or the dtype in which it computes.
      **kwargs: keyword arguments of the model, likewise.

    Returns:
      The collection, to be passed to `model.apply({"params": ..., "cache": cache}, ..., mutable=["cache"])`.
    """
    if dtype is not None:
        check_dtype(dtype)
    leaves, structure = jax.tree.flatten((args, kwargs))
    is_array = [isinstance(x, jax.Array | np.ndarray | jax.ShapeDtypeStruct) for x in leaves]

    def traced(arrays: list[Array]) -> Any:
        given = iter(arrays)
        filled = [next(given) if array else x for array, x in zip(is_array, leaves)]
        args, kwargs = jax.tree.unflatten(structure, filled)
        with _wanted(Wanted(batch, max_length, None if dtype is None else jnp.dtype(dtype))):
            return model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, *args, **kwargs)

    variables = jax.eval_shape(traced, [x for array, x in zip(is_array, leaves) if array])
    if "cache" not in variables:
        raise ValueError(f"The model holds no attention module of mqa_jax: {type(model).__name__}.")
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables["cache"])
