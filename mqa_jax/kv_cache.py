"""The layout of Flax's mutable `cache` collection, and what can be done with it.

    cached_key    [batch, max_length, kv_heads, head_dim]    after norm and RoPE
    cached_value  [batch, max_length, kv_heads, head_dim]
    cache_index   int32 [batch]                              tokens written so far, which is the next position

The names are Flax's. Rows are independent: each has its own index, so rows of one batch may be at different positions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mqa_jax.shapes import positions

KEY, VALUE, INDEX = "cached_key", "cached_value", "cache_index"


class CachingModule:
    """Marks the modules for which `init_cache` allocates: they have a method `init_cache(batch, max_length, dtype)`."""


class Appended(NamedTuple):
    """What `append` found and made.

    Attributes:
      key, value: the cache with the new tokens in it, `[batch, max_length, kv_heads, head_dim]`.
      start: int32 `[batch]`, the position of the first new token.
      stop: int32 `[batch]`, the position after the last one; the new cache index.
      overflow: bool `[batch]`, rows in which the new tokens did not fit. Nothing was written there.
    """

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    start: Int[Array, " B"]
    stop: Int[Array, " B"]
    overflow: Bool[Array, " B"]


def new_cache(batch: int, max_length: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> dict[str, Array]:
    """An empty cache for one attention module."""
    if batch < 1 or max_length < 1:
        raise ValueError(f"A cache needs at least one row and one position: batch={batch}, max_length={max_length}.")
    shape = batch, max_length, kv_heads, head_dim
    return {KEY: jnp.zeros(shape, dtype), VALUE: jnp.zeros(shape, dtype), INDEX: jnp.zeros(batch, jnp.int32)}


def append(
    cache: Mapping[str, Array], key: Array, value: Array, lengths: Int[Array, " B"] | None, *, traced_check: bool = True
) -> Appended:
    """Writes new keys and values `[batch, T, kv_heads, head_dim]` behind what is there.

    `lengths`, int `[batch]`, says how many of the T are tokens; the rest is padding, which the next call overwrites.
    Too many tokens for a row are never clamped or dropped quietly: with concrete arrays a `ValueError`; under jit a
    check that `checkify` can see (unless `traced_check` is False), nothing written to that row, and `overflow` set.
    """
    old_key, old_value, start = cache[KEY], cache[VALUE], cache[INDEX]
    batch, max_length, *heads = old_key.shape
    if key.ndim != 4 or key.shape[0] != batch or list(key.shape[2:]) != heads:
        raise ValueError(
            f"New keys must fit the cache [batch, max_length, kv_heads, head_dim]={old_key.shape}: "
            f"key.shape={key.shape}."
        )
    if lengths is None:
        lengths = jnp.full(batch, key.shape[1], jnp.int32)
    stop = start + lengths
    overflow = stop > max_length
    if not isinstance(stop, jax.core.Tracer):
        _raise_if_full(stop, max_length)
    elif traced_check:
        checkify.debug_check(jnp.all(stop <= max_length), _FULL, index=jnp.max(stop), length=jnp.int32(max_length))
    fits = ~overflow
    return Appended(_write(old_key, key, start, fits), _write(old_value, value, start, fits), start, stop, overflow)


def init_cache(
    model: nn.Module, batch: int, max_length: int, *args: Any, dtype: DTypeLike | None = None, **kwargs: Any
) -> dict[str, Any]:
    """An empty `cache` collection for every attention module in a model. Nothing is run, only shapes are traced.

    Args:
      model: any `flax.linen` module; its attention modules may be nested, scanned over layers or rematerialised.
      batch: rows.
      max_length: positions of each row.
      *args: sample inputs of the model, as for `model.init`; `jax.ShapeDtypeStruct`s will do.
      dtype: of the cached keys and values. Default: the dtype in which each module computes.
      **kwargs: keyword arguments of the model.

    Returns:
      The collection, to be passed to `model.apply({"params": ..., "cache": cache}, ..., mutable=["cache"])`.
    """

    def allocate(next_method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, CachingModule):
            context.module.init_cache(batch, max_length, dtype)
        return next_method(*args, **kwargs)

    def traced(*args: Any) -> Any:
        with nn.intercept_methods(allocate):
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
        if path[-1].key != INDEX:
            return x
        aligned = rows.reshape((-1,) + (1,) * (x.ndim - batch_axis - 1))
        return jnp.where(aligned, 0, x)

    return jax.tree_util.tree_map_with_path(reset, cache)


def check_cache(cache: Any) -> None:
    """Raises if any row of a `cache` collection was given more tokens than fit: a full row only shows NaN by itself.

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
        checkify.check(jnp.all(index <= max_length), _FULL, index=jnp.max(index), length=jnp.int32(max_length))
    else:
        _raise_if_full(index, max_length)


def cache_bytes(cache: Any) -> int:
    """Bytes of the cached keys and values of a `cache` collection."""
    arrays = jax.tree_util.tree_leaves_with_path(cache)
    return sum(x.size * x.dtype.itemsize for path, x in arrays if path[-1].key in (KEY, VALUE))


_FULL = (
    "The cache is full: cache_index={index} after this call, max_length={length}. Make a longer cache with "
    "init_cache(batch, max_length), or reset these rows with reset_cache."
)


def _raise_if_full(index: Array, max_length: int) -> None:
    if np.any(np.asarray(index) > max_length):
        raise ValueError(_FULL.format(index=np.asarray(index), length=max_length))


def _write(old: Array, new: Array, start: Array, fits: Array) -> Array:
    """Row by row; XLA does it in place where the old array is donated or a loop carry.

    Padding may overhang the end even where the tokens fit. `dynamic_update_slice` then moves the slice back, so it is
    rolled forward by as much, and what was there before the first token is written back.
    """
    length = min(new.shape[1], old.shape[1])

    def row(old: Array, new: Array, start: Array, fits: Array) -> Array:
        at = jnp.clip(start, 0, old.shape[0] - length)
        moved = start - at
        before = lax.dynamic_slice_in_dim(old, at, length)
        place = positions(length)
        is_new = ((place >= moved) & fits)[:, None, None]
        new = new[:length] if length == 1 else jnp.roll(new[:length], moved, axis=0)
        new = jnp.where(is_new, new.astype(old.dtype), before)
        return lax.dynamic_update_slice_in_dim(old, new, at, axis=0)

    return jax.vmap(row)(old, new, start, fits)
