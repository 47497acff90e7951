"""Calls of attention over a cut sequence that are refused, and their messages. No device is needed to trace them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mqa_jax

MESH = AbstractMesh((2, 4), ("b", "s"), axis_types=(AxisType.Auto,) * 2)
shapes = lambda rows=16, columns=16, heads=4, kv_heads=4, batch=2: (
    jax.ShapeDtypeStruct((batch, rows, heads, 8), jnp.float32),
    *[jax.ShapeDtypeStruct((batch, columns, kv_heads, 8), jnp.float32)] * 2,
)


def on_mesh(sizes=None, mesh=MESH, sequence_axis="s", **options):
    call = functools.partial(mqa_jax.sharded_attention, sequence_axis=sequence_axis, mesh=mesh, **options)
    return jax.eval_shape(call, *shapes(**(sizes or {})))


def in_shard_map(axis_name="s", axis_names=("b", "s"), **options):
    call = functools.partial(mqa_jax.ring_attention, axis_name=axis_name, **options)
    run = jax.shard_map(call, mesh=MESH, in_specs=P("b", "s"), out_specs=P("b", "s"), axis_names=set(axis_names))
    return jax.eval_shape(run, *shapes(rows=20, columns=20))


def decode(**options):
    call = functools.partial(mqa_jax.decode_attention, axis_name="s", **options)
    run = jax.shard_map(call, mesh=MESH, in_specs=(P(), P(None, "s"), P(None, "s")), out_specs=P())
    return jax.eval_shape(run, *shapes())


def append(position=0, tokens=(2, 1, 4, 8), dtype=jnp.float32):
    call = lambda part, tokens: mqa_jax.append_to_part(part, tokens, position, axis_name="s")
    run = jax.shard_map(call, mesh=MESH, in_specs=(P(None, "s"), P()), out_specs=P(None, "s"))
    return jax.eval_shape(run, shapes()[1], jax.ShapeDtypeStruct(tokens, dtype))


def decode_in_a_module(axis="s", max_length=16, cut_x=None, **settings):
    """Inside of `jax.shard_map` where it is said how x is cut, else on a mesh."""
    layer = mqa_jax.GroupedQueryAttention(16, 4, sequence_axis=axis, **settings)
    whole = layer.clone(sequence_axis=None)
    variables = jax.eval_shape(lambda: whole.init(jax.random.key(0), jnp.zeros((2, 4, 16))))
    cache = jax.eval_shape(lambda: whole.init_cache(2, max_length))
    arguments = variables, cache, jax.ShapeDtypeStruct((2, 4, 16), jnp.float32)
    call = lambda variables, cache, x: layer.apply({**variables, "cache": cache}, x, mutable=["cache"])[0][0]
    if cut_x is not None:
        specs = P(), mqa_jax.partition_specs(cache, sequence="s"), cut_x
        return jax.eval_shape(jax.shard_map(call, mesh=MESH, in_specs=specs, out_specs=cut_x), *arguments)
    with jax.sharding.use_abstract_mesh(MESH):
        return jax.eval_shape(call, *arguments)


def on_two_meshes():
    arrays = [jnp.zeros(x.shape, x.dtype) for x in shapes()]
    for i, name in enumerate("sx"):
        mesh = jax.make_mesh((1,), (name,), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
        arrays[i] = jax.device_put(arrays[i], NamedSharding(mesh, P()))
    return mqa_jax.sharded_attention(*arrays, sequence_axis="s")


def on_no_device_axis():
    return mqa_jax.ring_attention(*(jnp.zeros(x.shape, x.dtype) for x in shapes()), axis_name="s")


def on_an_axis_of_vmap():
    call = functools.partial(mqa_jax.ring_attention, axis_name="s")
    return jax.eval_shape(
        jax.vmap(call, axis_name="s"), *(jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes())
    )


def derivative_with_8_bits():
    query, key, _ = shapes()
    stored, scale = jnp.zeros(key.shape, jnp.int8), jnp.ones(key.shape[:-1])
    options: Any = dict(key_scale=scale, value_scale=scale, sequence_axis="s", mesh=MESH)
    return jax.eval_shape(jax.grad(lambda x: mqa_jax.sharded_attention(x, stored, stored, **options).sum()), query)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "unknown strategy": (lambda: on_mesh(strategy="rings"), r"Unknown strategy='rings': use one of \['ring', 'all_g"),
    "unknown order": (lambda: on_mesh(order="striped"), r"Unknown order='striped': use one of \['contiguous', 'zig"),
    "unknown strategy, inside": (lambda: in_shard_map(strategy=None), "Unknown strategy=None: use one of"),
    "unknown axis": (
        lambda: on_mesh(sequence_axis="t"),
        r"sequence_axis must name axes of the mesh: sequence_axis='t' \(str\), unknown \['t'\], mesh {'b': 2, 's': 4}",
    ),
    "unknown axis, inside": (
        lambda: in_shard_map(axis_name="t"),
        r"axis_name must name a mesh axis .*axis_name='t', manual axes \['b', 's'\]. Outside .* sharded_attention",
    ),
    "outside": (on_no_device_axis, r"axis_name must name a mesh axis of the jax.shard_map around .*manual axes \[\]"),
    "axis of vmap": (on_an_axis_of_vmap, r"axis_name must name a mesh axis .*axis_name='s', manual axes \[\]"),
    "no axis": (lambda: on_mesh(sequence_axis=None), r"sequence_axis must name axes of the mesh: sequence_axis=None"),
    "axis twice": (
        lambda: on_mesh(batch_axis="s"),
        r"A mesh axis can cut one axis .*'sequence_axis': \('s',\), 'batch_axis': \('s',\).*Give each another",
    ),
    "no mesh": (lambda: on_mesh(mesh=None), r"sharded_attention needs a mesh, .*mesh=None. Pass mesh=, or call inside"),
    "two meshes": (on_two_meshes, "query, key, value must be on one mesh: {'query': .*'key': .*jax.device_put"),
    "T": (
        lambda: on_mesh(dict(rows=18)),
        r"The query length T must be a multiple .*T=18, mesh axes \('s',\), devices=4. Pad",
    ),
    "S": (lambda: on_mesh(dict(columns=17)), "The key length S must be a multiple .*S=17,.*devices=4"),
    "B": (lambda: on_mesh(dict(batch=3), batch_axis="b"), "The batch B must be a multiple .*B=3,.*devices=2"),
    "N": (
        lambda: on_mesh(dict(heads=3, kv_heads=3), heads_axis="b"),
        "The number of query heads N must be a multiple .*N=3,.*devices=2",
    ),
    "K": (
        lambda: on_mesh(dict(heads=12, kv_heads=6), sequence_axis="b", heads_axis="s"),
        "must divide one another: kv_heads=6, devices=4. Use another heads_axis",
    ),
    "zigzag, odd": (
        lambda: on_mesh(dict(rows=12, columns=12), order="zigzag", is_causal=True),
        "With order='zigzag' the length must be a multiple of 2 [*] devices: T=12, S=12, devices=4. Pad the sequence",
    ),
    "zigzag, not causal": (
        lambda: on_mesh(order="zigzag"),
        "order='zigzag' is for causal .*'contiguous' gives all devices equal work: is_causal=False, local_window",
    ),
    "zigzag, window": (
        lambda: on_mesh(order="zigzag", is_causal=True, local_window_size=3),
        r"order='zigzag' is for causal .*is_causal=True, local_window_size=\(3, 3\)",
    ),
    "zigzag of 7": (
        lambda: mqa_jax.zigzag(jnp.zeros((2, 7)), 3),
        r"a multiple of 2 [*] devices: x.shape\[1\]=7, devices=3. Pad the sequence",
    ),
    "zigzag of no devices": (
        lambda: mqa_jax.zigzag(jnp.zeros((2, 8)), 0),
        r"devices must be a positive int: devices=0",
    ),
    "unzigzag of no axis": (
        lambda: mqa_jax.unzigzag(jnp.zeros((2, 8)), 2, 2),
        r"axis must be one of the axes of x: axis=2 \(int\), x.shape=\(2, 8\). Name that of tokens",
    ),
    "tokens of other heads": (
        lambda: append(tokens=(2, 1, 3, 8)),
        r"must have the dtype of the cache .*tokens=float32\[2, 1, 3, 8\], part=float32\[2, 4, 4, 8\]. Cast or reshape",
    ),
    "tokens of another dtype": (
        lambda: append(dtype=jnp.bfloat16),
        "must have the dtype of the cache .*tokens=bfloat16",
    ),
    "tokens beyond the end": (
        lambda: append(position=np.array([0, 16])),
        r"position must leave all 1 tokens in the cache: position=\[ 0 16\], the cache has 16 positions",
    ),
    "position of another shape": (
        lambda: append(position=np.array([0, 1, 2])),
        r"position has the wrong shape: position.shape=\(3,\), expected \(\) or \(2,\)",
    ),
    "decoding, lengths": (
        lambda: decode(key_value_seq_lengths=np.array([3, 17])),
        "key_value_seq_lengths must lie between 0 and .*length=16",
    ),
    "max_length of a module": (
        lambda: decode_in_a_module(max_length=18),
        r"the same number of positions on each: max_length=18, sequence_axis='s', devices=4. Make it with init_cache",
    ),
    "batch of a module": (
        lambda: decode_in_a_module(mqa_jax.SequenceAxis("b", batch_axis="s")),
        "The batch B must be a multiple .*B=2,.*devices=4",
    ),
    "tokens that are cut": (
        lambda: decode_in_a_module(cut_x=P(None, "s")),
        r"has all tokens of the call: x.shape=\(2, 1, 16\), which varies over .*\['s'\], sequence_axis='s'. Cut the c",
    ),
    "wrong call": (lambda: in_shard_map(dropout_rate=2), "dropout_rate must lie between 0 and 1"),
    "rows of other devices": (
        lambda: in_shard_map(bias=jnp.zeros((20, 20))),
        r"bias must broadcast to \[..., N, T, S\]: bias.shape=\(20, 20\), \[..., N, T, S\]=\(1, 4, 5, 20\)",
    ),
}
NOT_POSSIBLE: dict[str, tuple[Callable[[], object], str]] = {
    "derivative with 8 bits": (
        derivative_with_8_bits,
        "8 bits has no derivative. Differentiate with respect to the num",
    ),
    "ring buffer": (
        lambda: on_mesh(key_value_ring_lengths=np.array([3, 4])),
        "key_value_ring_lengths cannot be combined .*slots=16. Use a cache of all positions",
    ),
    "ring buffer in decoding": (
        lambda: decode(key_value_ring_lengths=np.array([3, 4])),
        "cannot be combined .*slots=16",
    ),
    "ring buffer in a module": (
        lambda: decode_in_a_module(cache_layout="ring", local_window_size=3),
        "A ring buffer, .* cannot be cut over devices: cache_layout='ring', sequence_axis='s'",
    ),
    "zigzag in a module": (
        lambda: decode_in_a_module(mqa_jax.SequenceAxis("s", order="zigzag")),
        "positions in their order: sequence_axis=.*A module with order='contiguous'",
    ),
    "reference in a module": (
        lambda: decode_in_a_module(attn_impl="reference"),
        "implementation='reference' has no passes that could run on a part of the keys",
    ),
    "reference": (
        lambda: on_mesh(implementation="reference"),
        "implementation='reference' has no passes that could run on a part of the keys. Use implementation=None",
    ),
}
