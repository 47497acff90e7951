"""The setting `sequence_axis` of the attention modules, and what a call then has of the sequence.

Projections and norms read one token at a time: nothing changes in them. What reads more is attention itself, which
another function then computes, and what counts tokens: positions and lengths.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from mqa_jax import shapes
from mqa_jax.attention import dot_product_attention
from mqa_jax.cache import layout
from mqa_jax.cache.append import ALL_HERE, Slots
from mqa_jax.layer.calls import Call
from mqa_jax.sharded import checks, decode
from mqa_jax.sharded.attention import ring_attention, sharded_attention
from mqa_jax.sharded.strategies import AxisName
from mqa_jax.sharded.zigzag import positions_at, zigzag


@dataclass(frozen=True)
class SequenceAxis:
    """The mesh axis over which the sequence is cut in an attention module, its setting `sequence_axis`.

    Parameters do not depend on it. On a mesh, that of `jax.set_mesh` or of the arrays, a call has whole arrays and
    computes `sharded_attention`. Inside of a `jax.shard_map` over this axis all mesh axes have to be manual; x and all
    else with an axis of tokens `[..., T/n, ...]` is then the part of the device, as for `ring_attention`.

    With a cache the tokens of a call are whole, any number of them, and the positions of the cache are cut, of which
    there are a multiple of n: a device writes and attends to its own, `[B, max_length/n, K, H]`, and two small sums are
    sent (`decode_attention`). On a mesh the cache is a whole array, cut by `partition_specs(cache, sequence=name)`;
    inside of `jax.shard_map` it is the part of the device, and x is the same on all.

    Attributes:
      name: of the mesh axis, or a tuple of several. T, and S where it differs, are multiples of its size n.
      strategy: "ring" or "all_gather", how keys and values get to the queries; not read with a cache.
      order: "contiguous" or "zigzag" (`mqa_jax.zigzag`), of the tokens in all arrays: x, segments, positions, both axes
        of bias and mask. Positions that a call does not give are in this order. A cache is "contiguous".
      batch_axis, heads_axis: the mesh axes that cut B and N of whole arrays, as in `sharded_attention`; not read inside
        of `jax.shard_map`.
    """

    name: AxisName
    strategy: str = field(default="ring", kw_only=True)
    order: str = field(default="contiguous", kw_only=True)
    batch_axis: AxisName | None = field(default=None, kw_only=True)
    heads_axis: AxisName | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        checks.known(self.strategy, self.order)
        others = {"batch_axis": self.batch_axis, "heads_axis": self.heads_axis}
        given = {name: x for name, x in others.items() if x is not None}
        for name, x in {"sequence_axis": self.name, **given}.items():
            names = x if isinstance(x, tuple) and x else (x,)
            if not all(isinstance(each, str) for each in names):
                raise ValueError(
                    "sequence_axis must be the name of a mesh axis, a tuple of several, mqa_jax.SequenceAxis with such "
                    f"names, or None: {name}={x!r}."
                )

    @classmethod
    def of(cls, setting: "SequenceAxisSetting") -> "SequenceAxis | None":
        """Of a setting, which may be the name alone."""
        return setting if setting is None or isinstance(setting, SequenceAxis) else cls(setting)


SequenceAxisSetting = AxisName | SequenceAxis | None


@dataclass(frozen=True)
class Sequence:
    """What the arrays of a call are of the sequence; by default all of it, on one device.

    Attributes:
      attend: attention of them, with the arguments of `dot_product_attention`.
      order: of their tokens.
      devices: that share the sequence.
      parts: the arrays are one of so many equal parts, the one with the number `part`.
      slots: of the cache.
    """

    attend: Callable[..., Any]
    order: str = "contiguous"
    devices: int = 1
    parts: int = 1
    part: Int[Array, ""] | int = 0
    slots: Slots = ALL_HERE

    def whole(self, length: Any) -> Any:
        """The length of the sequence of which an array has this length."""
        return length * self.parts

    def in_order(self, x: Array, axis: int = -1) -> Array:
        """All of a sequence in the order of the tokens."""
        return zigzag(x, self.devices, axis) if self.order == "zigzag" else x

    def positions(self, length: Any) -> shapes.Positions:
        """Of an array with this length."""
        places = shapes.positions(length) + (0 if self.parts == 1 else self.part * length)
        return positions_at(places, self.whole(length), self.devices) if self.order == "zigzag" else places


def of_call(
    setting: SequenceAxisSetting, call: Call, query: Array, cache: Any, needs_weights: bool, makes_parameters: bool
) -> Sequence:
    """`makes_parameters`: a call in which they are made needs no mesh, and no length that devices can share."""
    axis = SequenceAxis.of(setting)
    if axis is None:
        return Sequence(dot_product_attention)
    _check_call(setting, call, needs_weights)
    key = None if cache is None else cache[layout.KEY]
    if cache is not None:
        check_cache(setting, in_ring=layout.RING_INDEX in cache)
    if checks.is_manual(axis.name):
        return _of_part(axis) if key is None else _of_part_of_cache(axis, call.x)
    mesh = checks.mesh_in_use(x=call.x, cached_key=key)
    if makes_parameters and (mesh is None or key is not None or not _divides(axis, mesh, call)):
        return Sequence(dot_product_attention)
    if mesh is None:
        raise ValueError(
            "A module with a sequence_axis needs a mesh, and neither jax.set_mesh nor x have one: "
            f"sequence_axis={setting!r}, x.shape={call.x.shape}. Call it inside of jax.set_mesh(mesh), or of "
            "jax.shard_map; on one device, make the module with sequence_axis=None."
        )
    return _of_whole_arrays(axis, mesh) if key is None else _of_whole_cache(axis, mesh, query, key)


def _of_part(axis: SequenceAxis) -> Sequence:
    attend = functools.partial(ring_attention, axis_name=axis.name, strategy=axis.strategy, order=axis.order)
    devices = lax.axis_size(axis.name)
    return Sequence(attend, axis.order, devices, parts=devices, part=lax.axis_index(axis.name))


def _of_whole_arrays(axis: SequenceAxis, mesh: Any) -> Sequence:
    attend = functools.partial(
        sharded_attention,
        sequence_axis=axis.name,
        batch_axis=axis.batch_axis,
        heads_axis=axis.heads_axis,
        strategy=axis.strategy,
        order=axis.order,
        mesh=mesh,
    )
    return Sequence(attend, axis.order, checks.count("sequence_axis", axis.name, mesh))


# -- with a cache: tokens are whole, and what is cut are the positions of the cache -----------------------------------


def _of_part_of_cache(axis: SequenceAxis, x: Array) -> Sequence:
    if cut := checks.varying(axis.name, x):
        raise ValueError(
            "With a cache that is cut over devices each of them has all tokens of the call: x.shape="
            f"{x.shape}, which varies over the mesh axes {cut}, sequence_axis={axis.name!r}. Cut the cache, and "
            "not x, in the in_specs of jax.shard_map."
        )
    attend = functools.partial(decode.decode_attention, axis_name=axis.name)
    slots = Slots(lax.axis_size(axis.name), functools.partial(decode.write_to_part, axis.name))
    return Sequence(attend, slots=slots)


def _of_whole_cache(axis: SequenceAxis, mesh: Any, query: Array, key: Array) -> Sequence:
    devices = checks.count("sequence_axis", axis.name, mesh)
    if key.shape[1] % devices:
        raise ValueError(
            "A cache that devices share has the same number of positions on each: "
            f"max_length={key.shape[1]}, sequence_axis={axis.name!r}, devices={devices}. Make it with init_cache and "
            f"a max_length that is a multiple of {devices}."
        )
    axes = axis.name, axis.batch_axis, axis.heads_axis
    cut = checks.cut_of(mesh, query, key, *axes, whole_queries=True)
    attend, write = (functools.partial(x, mesh, cut) for x in (decode.attend_on_mesh, decode.write_on_mesh))
    return Sequence(attend, slots=Slots(write=write))


# -- what there is not ------------------------------------------------------------------------------------------------


def check_cache(setting: SequenceAxisSetting, in_ring: bool) -> None:
    """Whether a module with this setting can have a cache."""
    axis = SequenceAxis.of(setting)
    if axis is not None and axis.order != "contiguous":
        raise NotImplementedError(
            "A cache that is cut over devices has its positions in their order: "
            f"sequence_axis={setting!r}. A module with order='contiguous' has the same parameters."
        )
    if axis is not None and in_ring:
        raise NotImplementedError(
            "A ring buffer, whose slots hold any position, cannot be cut over devices: cache_layout='ring', "
            f"sequence_axis={setting!r}. A module with cache_layout='static', or sequence_axis=None, has the same "
            "parameters."
        )


def _check_call(setting: SequenceAxisSetting, call: Call, needs_weights: bool) -> None:
    refused = {
        "past_key_value": call.past_key_value is not None,
        "prev_layer_key_value with more tokens than x": call.query_offset != 0,
        "needs_weights=True": needs_weights,
    }
    if names := [name for name, is_given in refused.items() if is_given]:
        raise NotImplementedError(
            f"A sequence that is cut over devices cannot be combined with {' and '.join(names)}: "
            f"sequence_axis={setting!r}. A module with sequence_axis=None has the same parameters."
        )


def _divides(axis: SequenceAxis, mesh: Any, call: Call) -> bool:
    """Whether the devices can share the arrays."""
    chunks = checks.count("sequence_axis", axis.name, mesh) * (2 if axis.order == "zigzag" else 1)
    lengths = [jnp.shape(x)[-2] for x in (call.x, call.inputs_k) if x is not None]
    rows = call.x.shape[-3] if call.x.ndim > 2 else 1
    return all(n % chunks == 0 for n in lengths) and rows % checks.count("batch_axis", axis.batch_axis, mesh) == 0
