"""`sharded_attention` of whole arrays and `ring_attention` of a device's parts, with their checks."""

import functools
from typing import Any

from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from mqa_jax.attention import compute_of, inputs_of, inputs_of_part
from mqa_jax.batch_axes import over_flat_batch
from mqa_jax.inputs import Inputs
from mqa_jax.kernels import flash
from mqa_jax.sharded import checks, on_mesh, ring
from mqa_jax.sharded.chunks import Order
from mqa_jax.sharded.strategies import AllGather, AxisName, Ring


def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    axis_name: AxisName,
    strategy: str = "ring",
    order: str = "contiguous",
    **options: Any,
) -> Any:
    """Attention inside of `jax.shard_map`, over a sequence of which each device of a mesh axis has an equal part.

    The result is that of `dot_product_attention` of the whole arrays, to rounding errors. Of n devices each has

        query `[..., T/n, N, H]`    key `[..., S/n, K, H]`    value `[..., S/n, K, V]`
        bias, mask `[..., N, T/n, S]`: its rows, all columns    segments `[..., T/n]`, `[..., S/n]`
        lengths and the query's offset: those of the whole sequence, the same on all devices

    Batch rows and heads are what the device has: it numbers them from 0, which dropout, `score_fn` and `mask_fn` see.

    Args:
      query, key, value, bias, mask: see above; dtypes are those of `dot_product_attention`.
      axis_name: the mesh axis, or several, that the sequence is cut over. All mesh axes have to be manual.
      strategy: "ring", in which keys and values travel, or "all_gather", in which each device gets all of them
        (`docs/devices.md` says which is better when). Gradients of keys and values are summed in float32 by both.
      order: of the tokens: "contiguous", or "zigzag" (`mqa_jax.zigzag`), for causal attention without a window, where
        devices then have equal work. All arrays, rows and columns alike, are in this order.
      **options: all others of `dot_product_attention` but `key_value_ring_lengths`.

    Returns:
      As `dot_product_attention`, for the queries of this device: `[..., T/n, N, V]`, and `[..., T/n, N]`. Both are
      differentiable, to any order, in forward and reverse mode; second derivatives gather all keys and values. In a
      window of a causal call keys travel no further than it reaches.

    Raises:
      ValueError: the call is wrong, as there; or the axis, strategy or order does not exist or fit.
      NotImplementedError: an option that a cut sequence does not have, or an implementation without passes of its own.
    """
    devices = checks.axis_size(axis_name)
    checks.of_mesh(axis_name)
    checks.known(strategy, order)
    implementation = options.get("implementation")
    inputs = inputs_of_part((devices, devices), query, key, value, bias, mask, **options)
    return checks.results(
        inputs, over_flat_batch(functools.partial(_attend, axis_name, strategy, order, implementation), inputs)
    )


def sharded_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    sequence_axis: AxisName,
    batch_axis: AxisName | None = None,
    heads_axis: AxisName | None = None,
    strategy: str = "ring",
    order: str = "contiguous",
    mesh: Any = None,
    **options: Any,
) -> Any:
    """Attention of whole arrays, of which the devices of a mesh share the sequence, and batch and heads if asked to.

    `ring_attention` in a `jax.shard_map` over all axes of the mesh. The result, dropout included, is that of
    `dot_product_attention`; with order="zigzag" rows are in the order of the arrays.

    Args:
      query, key, value, bias, mask: whole arrays, as for `dot_product_attention`.
      sequence_axis: the mesh axis, or several, that cut T and S. Both are multiples of its size.
      batch_axis, heads_axis: likewise for B (the last of the leading axes) and N. None cuts neither; on `Explicit` axes
        it is what the type of the query says. Where heads are cut, K and the number of devices divide one another; with
        fewer key/value heads than devices, some devices have the same.
      strategy, order: as for `ring_attention`.
      mesh: a mesh with these axes. Default: that of `jax.set_mesh`, or that of the arrays.
      **options: all others of `dot_product_attention` but `key_value_ring_lengths`.

    Returns:
      As `dot_product_attention`, cut as the query. Differentiable as `ring_attention` is.

    Raises:
      ValueError, NotImplementedError: as `ring_attention`; and where the axes of the mesh do not exist or do not divide
        the arrays.
    """
    checks.known(strategy, order)
    mesh = checks.mesh_of(mesh, query=query, key=key, value=value)
    inputs = inputs_of(query, key, value, bias, mask, **options)
    operands, settings = inputs.operands, (strategy, order, options.get("implementation"))
    cut = checks.cut_of(mesh, operands.query, operands.key, sequence_axis, batch_axis, heads_axis)
    run = functools.partial(on_mesh.attend, mesh, cut, _attend, settings)
    return checks.results(inputs, over_flat_batch(run, inputs))


def _attend(
    axis: AxisName, strategy: str, order: str, implementation: str | None, inputs: Inputs
) -> tuple[Array, Array | None]:
    checks.possible(inputs, order)
    kernels = checks.kernels(implementation, compute_of(implementation, inputs))
    if 0 in (inputs.sizes.B, inputs.sizes.T, inputs.sizes.S, inputs.sizes.N):
        return flash.attend(kernels, inputs)
    how = Order(order, lax.axis_size(axis))
    checks.divides(how, inputs)
    return ring.attend(kernels, Ring.make(axis, how, inputs) if strategy == "ring" else AllGather(axis, how), inputs)
