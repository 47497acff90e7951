"""Caches of NNX models: making them, what users do with them, and steps that update them in place."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Int

from mqa_jax.cache import rows as cache_rows
from mqa_jax.nnx.attention import GroupedQueryAttention


def init_cache(
    model: nnx.Module, batch: int, max_length: int, *, dtype: DTypeLike | None = None, calls: int = 1
) -> None:
    """Gives every attention module in a model an empty cache, in place.

    `nnx.view(model, decode=True, batch_size=batch, max_length=max_length)` leaves the model as it is and returns one
    that shares its weights; with `only=` it leaves out modules that need no cache, such as cross-attention.

    Args:
      model: any `flax.nnx` module; its attention modules may be nested, or stacked for `nnx.scan`.
      batch: rows.
      max_length: positions of each row. Ring buffers take any number: they have as many slots as their windows need.
        With a `sequence_axis` it is a multiple of the devices that share them.
      dtype: of the cached keys and values: a float dtype, "int8" or "float8_e4m3fn". Default: each module's
        `cache_dtype`, or the dtype in which it computes.
      calls: how often one step calls each module (ALBERT, Zamba), each time with a cache of its own.
    """
    modules = [module for _, module in nnx.iter_modules(model) if isinstance(module, GroupedQueryAttention)]
    if not modules:
        raise ValueError(f"The model holds no attention module of mqa_jax: {type(model).__name__}.")
    for module in modules:
        module.init_cache(batch, max_length, dtype, calls=calls)


def reset_cache(model: Any, rows: Bool[ArrayLike, " B"], *, batch_axis: int | None = None) -> Any:
    """`mqa_jax.reset_cache` of a model, in place, or of `nnx.state(model, nnx.Cache)`, whose successor it returns."""
    return _changed(model, lambda cache: cache_rows.reset_cache(cache, rows, batch_axis=batch_axis))


def reorder_cache(model: Any, rows: Int[ArrayLike, " B"], *, batch_axis: int | None = None) -> Any:
    """`mqa_jax.reorder_cache` of a model, in place, or of `nnx.state(model, nnx.Cache)`, whose successor it returns."""
    return _changed(model, lambda cache: cache_rows.reorder_cache(cache, rows, batch_axis=batch_axis))


def check_cache(model: Any) -> None:
    """`mqa_jax.check_cache` of a model, or of its state."""
    cache_rows.check_cache(_cache_of(model))


def cache_bytes(model: Any) -> int:
    """`mqa_jax.cache_bytes` of a model, or of its state."""
    return cache_rows.cache_bytes(_cache_of(model))


def decoding_step(
    model: nnx.Module, function: Callable = lambda model, *arguments, **options: model(*arguments, **options)
) -> tuple[Callable, Any]:
    """A compiled step that writes to the cache in place, and the cache. `nnx.jit` would copy all of it in every step.

    Args:
      model: a model whose attention modules have a cache. It hands it over: the first step deletes it, and
        `nnx.update(model, cache)` puts a later one back.
      function: `function(model, *arguments, **options)`, by default the call of the model. It may change no variable
        but the cache.

    Returns:
      (step, cache), the second `nnx.state(model, nnx.Cache)`. `step(cache, *arguments, **options)` returns what
      `function` does and the new cache, and the old one is gone (`donate_argnums` of `jax.jit`).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mqa_jax import nnx as mqa_nnx
      >>> attention = mqa_nnx.GroupedQueryAttention(64, 8, kv_heads=2, rngs=nnx.Rngs(0))
      >>> cached = nnx.view(attention, decode=True, batch_size=2, max_length=32)
      >>> step, cache = mqa_nnx.decoding_step(cached)
      >>> (prompt, _, _), cache = step(cache, jnp.ones((2, 4, 64)))
      >>> (token, _, _), cache = step(cache, jnp.ones((2, 1, 64)))
    """
    graphdef, cache, rest = nnx.split(model, nnx.Cache, ...)  # type: ignore[misc]
    cache_rows.cache_bytes(cache)  # says so where there is none
    weights, structure = jax.tree.flatten(rest)

    def run(cache: Any, weights: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        merged = nnx.merge(graphdef, cache, jax.tree.unflatten(structure, weights))
        result = function(merged, *arguments, **options)
        _, cache, after = nnx.split(merged, nnx.Cache, ...)  # type: ignore[misc]
        _check_unchanged(weights, after)
        return result, cache

    compiled = jax.jit(run, donate_argnums=0)
    return (lambda cache, *arguments, **options: compiled(cache, weights, *arguments, **options)), cache


def _check_unchanged(before: list, after: Any) -> None:
    """Under jit an array that was not assigned is the same tracer."""
    changed = [
        jax.tree_util.keystr(path)
        for old, (path, new) in zip(before, jax.tree.leaves_with_path(after))
        if new is not old
    ]
    if changed:
        raise ValueError(
            f"A decoding step keeps no variable but the cache, and this one assigns to others: {changed[:3]}. Without "
            "dropout, nnx.view(model, deterministic=True), no random stream advances; other modules' state needs "
            "nnx.jit."
        )


def _cache_of(model: Any) -> Any:
    return nnx.state(model, nnx.Cache) if isinstance(model, nnx.Module) else model


def _changed(model: Any, change: Callable[[Any], Any]) -> Any:
    cache = change(_cache_of(model))
    if not isinstance(model, nnx.Module):
        return cache
    nnx.update(model, cache)
    return None
