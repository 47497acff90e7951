"""Decoding with a cache whose positions are cut over devices, inside of `jax.shard_map` or of whole arrays on a mesh.

The queries are few and the keys are many, so keys stay where they are: each device attends to its own, and what is
summed over devices are its output and the sum of its weights (Dao et al. 2023, "Flash-Decoding"). A new token is
written by the device that has its position.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Shaped

from mqa_jax.arguments import array, in_32_bits, integers
from mqa_jax.attention import compute_of, inputs_of, inputs_of_part
from mqa_jax.axes import Cut
from mqa_jax.batch_axes import over_flat_batch
from mqa_jax.cache import append
from mqa_jax.inputs import Inputs
from mqa_jax.kernels import flash, online_softmax
from mqa_jax.kernels.online_softmax import State
from mqa_jax.sharded import checks, on_mesh, ring
from mqa_jax.sharded.chunks import Chunk, Order, pair
from mqa_jax.sharded.strategies import AxisName


def decode_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    axis_name: AxisName,
    **options: Any,
) -> Any:
    """Attention of queries, the same on all devices, to keys of which each of n devices has an equal part.

    Args:
      query: `[..., T, N, H]`, whole.
      key, value: `[..., S/n, K, H]` and `[..., S/n, K, V]`, in the order of the devices; 8 bits with scales as well.
      bias, mask: `[..., N, T, S]`, whole. Lengths and the query's offset are those of the whole sequence.
      axis_name: the mesh axis, or several, that the keys are cut over. All mesh axes have to be manual.
      **options: all others of `dot_product_attention` but `key_value_ring_lengths`; segments of keys, and scales, are
        cut as the keys.

    Returns:
      As `dot_product_attention`; the same on all devices. Two small sums over devices are all that is sent.

    Raises:
      ValueError, NotImplementedError: as `ring_attention`.
    """
    devices, implementation = checks.axis_size(axis_name), options.get("implementation")
    inputs = inputs_of_part((1, devices), query, key, value, bias, mask, **options)
    return checks.results(inputs, over_flat_batch(functools.partial(_attend, axis_name, implementation), inputs))


def attend_on_mesh(mesh: Any, cut: Cut, *arrays: Any, **options: Any) -> Any:
    """`decode_attention` of whole arrays, of which a mesh cuts the keys, and batch and heads of all."""
    inputs = inputs_of(*arrays, **options)
    run = functools.partial(on_mesh.attend, mesh, cut, _attend, (options.get("implementation"),))
    return checks.results(inputs, over_flat_batch(run, inputs))


def _attend(axis: AxisName, implementation: str | None, inputs: Inputs) -> on_mesh.Found:
    checks.no_ring_buffer(inputs)
    kernels = checks.kernels(implementation, compute_of(implementation, inputs))
    first = jnp.int32(0)
    (keys,) = Order("contiguous", lax.axis_size(axis)).chunks(lax.axis_index(axis), inputs.sizes.S)
    operands, queries = inputs.operands, Chunk(first, 0, first, inputs.sizes.T)
    part = pair(inputs, queries, keys, operands.key, operands.value, is_part=False)
    state = _summed(axis, *flash.attend(kernels, part))
    out, normalizer = ring.finish(inputs, state)
    return out, normalizer.log_sum_exp if inputs.residual else None


def _summed(axis: AxisName, out: Array, log_sum_exp: Array | None) -> State:
    """Over devices: the highest number first, and then, in one message, all that is weighted by it."""
    assert log_sum_exp is not None  # a part has one
    highest = lax.pmax(lax.stop_gradient(log_sum_exp), axis)[..., None]
    weight = jnp.exp(log_sum_exp[..., None] - online_softmax.finite(highest))
    total = lax.psum(jnp.concatenate([out.astype(weight.dtype) * weight, weight], axis=-1), axis)
    return State(highest, total[..., -1:], total[..., :-1])


# -- new tokens -------------------------------------------------------------------------------------------------------


def write_to_part(axis: AxisName, old: Array, new: Array, start: Array, fits: Array) -> Array:
    """`mqa_jax.cache.append.write` of the part that a device has of a cache."""
    return append.write(old, new, start - lax.axis_index(axis) * old.shape[1], fits)


@functools.partial(jax.jit, static_argnums=(0, 1))
def write_on_mesh(mesh: Any, cut: Cut, old: Array, new: Array, start: Array, fits: Array) -> Array:
    """The same of a whole cache on a mesh, whose parts stay where they are."""
    letters = "bskh"[: old.ndim], "bxkh"[: old.ndim], "b", "b"
    arrays = [old, new, start, fits]
    specs = [cut.spec(x, array.shape) for x, array in zip(letters, arrays, strict=True)]
    return on_mesh.over(mesh, functools.partial(write_to_part, cut.names("s")), specs, specs[0], arrays)


def append_to_part(
    part: ArrayLike, tokens: ArrayLike, position: ArrayLike, *, axis_name: AxisName
) -> Shaped[Array, "B part ..."]:
    """A cache with new tokens, of which each device has a part: the device that has a position writes it.

    Args:
      part: `[B, S/n, ...]`, the part of this device; keys, values, or their scales.
      tokens: `[B, T, ...]`, the same on all devices, in the dtype of the cache.
      position: of the first token in the whole cache, an int or int `[B]`.
      axis_name: the mesh axis, or several, that the cache is cut over.

    Returns:
      The part with its tokens. It is written in place where the caller donates it. Where traced positions go beyond the
      end, a floating point cache gets NaN in their place, the last slot included, and so does attention to them.

    Raises:
      ValueError: the shapes or dtypes do not belong together, or the tokens go beyond the end.
    """
    devices = checks.axis_size(axis_name)
    part, tokens = array("part", part), array("tokens", tokens)
    checks.belong_together(part, tokens)
    batch, slots, count = *part.shape[:2], tokens.shape[1]
    first = integers("position", position, (), (batch,))
    end = slots * devices
    if not isinstance(first, jax.core.Tracer):
        rule = f"leave all {count} tokens in the cache"
        first = in_32_bits("position", first, rule, f"the cache has {end} positions", 0, end - count)
    start = jnp.broadcast_to(jnp.asarray(first, jnp.int32), (batch,))
    if jnp.issubdtype(tokens.dtype, jnp.inexact):
        fits = (start >= 0) & (start <= end - count)
        tokens = jnp.where(fits.reshape(batch, *[1] * (tokens.ndim - 1)), tokens, jnp.nan)
    return write_to_part(axis_name, part, tokens, jnp.clip(start, 0, end - 1), jnp.ones(batch, bool))
