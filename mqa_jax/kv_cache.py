"""The layouts of Flax's mutable `cache` collection, and what users do with it.

    cached_key          [batch, length, kv_heads, head_dim]    after norm and RoPE
    cached_value        [batch, length, kv_heads, head_dim]
    cached_key_scale    float32 [batch, length, kv_heads]      where keys are in 8 bits (`mqa_jax.quantization`)
    cached_value_scale  float32 [batch, length, kv_heads]
    cache_index         int32 [batch]                          tokens written so far, which is the next position
    ring_index          int32 [batch]                          the same of a ring buffer, instead of cache_index

The names are Flax's, where it has one. Rows are independent: each has its own index, so rows of one batch may be at
different positions.

A static cache has a place for each position up to `length`, and is full after that. A ring buffer is for a window: it
holds the latest tokens alone, position p in slot p modulo `length`, and any number of tokens goes through it (2**31).
`mqa_jax.cache_append` writes to both.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Int

from mqa_jax import quantization
from mqa_jax.checks import DTYPES

KEY, VALUE, INDEX, RING_INDEX = "cached_key", "cached_value", "cache_index", "ring_index"
KEY_SCALE, VALUE_SCALE = "cached_key_scale", "cached_value_scale"
CONTENTS = KEY, VALUE, KEY_SCALE, VALUE_SCALE
NAMES = *CONTENTS, INDEX, RING_INDEX

LAYOUTS = "static", "ring"
READ_IN_PLACE = 16  # new tokens at most, for which a ring has room beside its window


_wanted = jax.make_user_context(None)  # what the programs traced inside depend on, besides their arguments


class CachingModule:
    """Marks the modules for which `init_cache` allocates: they have a method `init_cache(batch, max_length, dtype)`."""


def new_cache(
    batch: int, length: int, kv_heads: int, head_dim: int, dtype: DTypeLike, index: str = INDEX
) -> dict[str, Array]:
    """An empty cache for one attention module; `index` is INDEX or RING_INDEX."""
    if batch < 1 or length < 1:
        raise ValueError(f"A cache needs at least one row and one position: batch={batch}, max_length={length}.")
    check_dtype(dtype)
    shape = batch, length, kv_heads, head_dim
    cache = {KEY: jnp.zeros(shape, dtype), VALUE: jnp.zeros(shape, dtype), index: jnp.zeros(batch, jnp.int32)}
    if quantization.is_quantized(dtype):
        cache |= {name: jnp.zeros(shape[:-1], jnp.float32) for name in (KEY_SCALE, VALUE_SCALE)}
    return cache


def check_dtype(dtype: DTypeLike) -> None:
    if jnp.dtype(dtype) not in DTYPES and not quantization.is_quantized(dtype):
        names = [jnp.dtype(known).name for known in (*DTYPES, *quantization.DTYPES)]
        raise ValueError(f"Keys and values are cached as one of {names}: dtype={jnp.dtype(dtype).name}.")


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
      model: any `flax.linen` module; its attention modules may be nested, scanned over layers or rematerialised.
      batch: rows.
      max_length: positions of each row. Ring buffers take any number: they have as many slots as their windows need.
      *args: sample inputs of the model, as for `model.init`; `jax.ShapeDtypeStruct`s will do.
      dtype: of the cached keys and values: a float dtype, "int8" or "float8_e4m3fn". Default: each module's
        `cache_dtype`, or the dtype in which it computes.
      **kwargs: keyword arguments of the model.

    Returns:
      The collection, to be passed to `model.apply({"params": ..., "cache": cache}, ..., mutable=["cache"])`.
    """

    def allocate(next_method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, CachingModule):
            context.module.init_cache(batch, max_length, dtype)
        return next_method(*args, **kwargs)

    def traced(*args: Any) -> Any:
        # A module under nn.jit is traced once, and not again for another cache, unless JAX is told of it.
        with nn.intercept_methods(allocate), _wanted((batch, max_length, str(dtype))):
            return model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, *args, **kwargs)

    variables = jax.eval_shape(traced, *args)
    if "cache" not in variables:
        raise ValueError(f"The model holds no attention module of mqa_jax: {type(model).__name__}.")
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), variables["cache"])


def reorder_cache(cache: Any, rows: Int[ArrayLike, " B"], *, batch_axis: int = 0) -> Any:
    """Row b of the result is row `rows[b]` of `cache`, a `cache` collection: what beam search does after each step.

    `batch_axis` is 1 for a model that scans over its layers, whose arrays start with a layer axis.
    """
    rows = jnp.asarray(rows)
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=batch_axis), cache)


def reset_cache(cache: Any, rows: Bool[ArrayLike, " B"], *, batch_axis: int = 0) -> Any:
    """Starts the rows anew where `rows` is True: their index becomes 0, and what they held is no longer seen."""
    rows = jnp.asarray(rows)
    if rows.dtype != jnp.bool_:
        raise ValueError(
            f"rows must be bool [batch], True = reset: rows.dtype={rows.dtype!s}, rows.shape={rows.shape}."
        )

    def reset(path: tuple, x: Array) -> Array:
        if path[-1].key not in (INDEX, RING_INDEX):
            return x
        aligned = rows.reshape((-1,) + (1,) * (x.ndim - batch_axis - 1))
        return jnp.where(aligned, 0, x)

    return jax.tree_util.tree_map_with_path(reset, cache)


def check_cache(cache: Any) -> None:
    """Raises if any row of a `cache` collection was given more tokens than fit: a full row only shows NaN by itself.

    Ring buffers are never full.

    Under jit it is a `jax.experimental.checkify.check`, so the function has to be transformed by `checkify.checkify`.
    Modules make this check by themselves, except inside Flax's lifted transformations such as `nn.scan`.
    """
    if not isinstance(cache, Mapping):
        return
    if INDEX not in cache:
        for part in cache.values():
            check_cache(part)
        return
    index, max_length = cache[INDEX], cache[KEY].shape[-3]
    if isinstance(index, jax.core.Tracer):
        checkify.check(jnp.all(index <= max_length), FULL, index=jnp.max(index), length=jnp.int32(max_length))
    else:
        raise_beyond(max_length, index, FULL)


def cache_bytes(cache: Any) -> int:
    """Bytes of the cached keys and values of a `cache` collection, with their scales if they have any."""
    arrays = jax.tree_util.tree_leaves_with_path(cache)
    return sum(x.size * x.dtype.itemsize for path, x in arrays if path[-1].key in CONTENTS)


FULL = (
    "The cache is full: cache_index={index} after this call, max_length={length}. Make a longer cache with "
    "init_cache(batch, max_length), or reset these rows with reset_cache."
)


def raise_beyond(length: int, index: Array, message: str) -> None:
    if np.any(np.asarray(index) > length):
        raise ValueError(message.format(index=np.asarray(index), length=length))
