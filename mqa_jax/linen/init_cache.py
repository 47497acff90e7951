"""How the `cache` collection of a whole model of linen is made: its attention modules make it while they are traced."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from mqa_jax.cache.layout import check_dtype


class Wanted(NamedTuple):
    """What `init_cache` asks every attention module for that is traced while it runs."""

    batch: int
    max_length: int
    dtype: Any


_wanted = jax.make_user_context(None)  # of which JAX knows that traced programs depend on it, those of nn.jit too


def wanted() -> Wanted | None:
    return _wanted.value


def init_cache(
    model: nn.Module, batch: int, max_length: int, *args: Any, dtype: DTypeLike | None = None, **kwargs: Any
) -> dict[str, Any]:
    """An empty `cache` collection for every attention module in a model. Nothing is run, only shapes are traced.

    Args:
      model: any `flax.linen` module; its attention modules may be nested, scanned over layers or rematerialised. One
        that the model calls several times gets a cache for each call. Cross-attention gets none.
      batch: rows.
      max_length: positions of each row. Ring buffers take any number: they have as many slots as their windows need.
        With a `sequence_axis` it is a multiple of the devices that share them.
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
