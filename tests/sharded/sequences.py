"""Runs in a process of its own with 8 CPU devices: sequences that are cut over devices, against one device."""

import dataclasses
import functools
import itertools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mqa_jax

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
B, T, N, K, H, V = 2, 48, 4, 2, 8, 8
DEVICES = 1, 2, 3, 8
WAYS = [*itertools.product(("ring", "all_gather"), ("contiguous", "zigzag"))]

numbers = lambda *values: jnp.asarray(values, jnp.int32)
ids = lambda step: jnp.broadcast_to(jnp.arange(T) // step, (B, T))
EVERYTHING: dict[str, Any] = dict(
    is_causal=True,
    bias=normal(1, N, T, T),
    mask=normal(B, 1, T, T) > -1,
    sinks=normal(N),
    alibi_slopes=normal(N) / 8,
    logits_soft_cap=2.0,
    query_seq_lengths=numbers(T, 31),
    key_value_seq_lengths=numbers(41, 17),
    query_segment_ids=ids(20),
    key_value_segment_ids=ids(20),
    dropout_rate=0.3,
    dropout_rng=jax.random.key(1),
)
CAUSAL: dict[str, dict[str, Any]] = {
    "causal": {},
    "value features": dict(value_features=5),
    "segments": dict(query_segment_ids=ids(11), key_value_segment_ids=ids(11)),
    "lengths": dict(query_seq_lengths=numbers(T, 13), key_value_seq_lengths=numbers(0, 19)),
    "ALiBi and soft cap": dict(alibi_slopes=normal(N) / 8, logits_soft_cap=1.5),
    "sinks": dict(sinks=normal(N), query_seq_lengths=numbers(T, 13)),
    "dropout": dict(dropout_rate=0.3, dropout_rng=jax.random.key(1)),
    "bias": dict(bias=normal(B, N, T, T)),
    "shared bias": dict(bias=normal(1, 1, 1, T)),
    "bias of rows": dict(bias=normal(B, 1, T, 1)),
    "mask": dict(mask=normal(1, N, T, T) > 0),
    "offset": dict(query_offset=numbers(-9, 30)),
    "other lengths": dict(columns=2 * T, query_offset=21),
    "everything": EVERYTHING,
    "functions": {
        "score_fn[0]": mqa_jax.functions.t5,
        "score_fn[1]": normal(8, N),
        "mask_fn[0]": mqa_jax.functions.sink_and_window,
        "mask_fn[1]": numbers(3)[0],
        "mask_fn[2]": numbers(9)[0],
    },
}
NOT_CAUSAL: dict[str, dict[str, Any]] = {
    "full": dict(is_causal=False),
    "causal window": dict(local_window_size=(7, 0)),
    "window": dict(local_window_size=(7, 10), is_causal=False),
    "window to one side": dict(local_window_size=(-1, 6), is_causal=False),
    "window and offset": dict(local_window_size=(7, 3), is_causal=False, query_offset=11),
    "window and everything": EVERYTHING | dict(local_window_size=(9, 4), is_causal=False),
    "no causal mask and everything": EVERYTHING | dict(is_causal=False),
}
OPTIONS = CAUSAL | NOT_CAUSAL

# The axes of tokens of everything that has them.
TOKENS = {
    "query": (1,),
    "key": (1,),
    "value": (1,),
    "bias": (2, 3),
    "mask": (2, 3),
    "query_segment_ids": (1,),
    "key_value_segment_ids": (1,),
    "key_scale": (1,),
    "value_scale": (1,),
}


@functools.cache
def problem(name):
    """With its results by the reference, and by a plain computation in its precision."""
    sizes = dict(rows=T, columns=T, heads=N, kv_heads=K, features=H, value_features=V, is_causal=True)
    found = oracle.random_problem(np.random.default_rng(1), batch=(B,), **(sizes | OPTIONS[name]))
    return found, oracle.plain_results(found), oracle.results(found, "reference")


def reordered(x, axes, change):
    for axis in axes:
        x = change(x, axis) if x.shape[axis] > 1 else x
    return x


def in_order(attend, order, devices):
    """Attention of arrays in the order of the sequence."""
    if order == "contiguous":
        return attend

    def reordering(**arrays):
        into = lambda x, axis: mqa_jax.zigzag(x, devices, axis)
        arrays = {name: reordered(x, TOKENS.get(name, ()), into) for name, x in arrays.items()}
        return [mqa_jax.unzigzag(x, devices) for x in attend(**arrays)]

    return reordering


def mesh_of(devices, names=("s",), kind=AxisType.Auto):
    sizes = devices if isinstance(devices, tuple) else (devices,)
    count = int(np.prod(sizes))
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes), devices=jax.devices()[:count])


def attention(mesh, strategy, order, devices, **axes):
    options = dict(sequence_axis="s", mesh=mesh, strategy=strategy, order=order, implementation="xla", **axes)
    return in_order(functools.partial(mqa_jax.sharded_attention, **options, return_residual=True), order, devices)


def agrees(name, attend):
    one, plain, right = problem(name)
    actual = oracle.compiled(one, lambda arrays, options: attend(**oracle.arguments(arrays, options)))(one)
    oracle.judge(actual, plain, right)


def check(name, strategy, order, devices):
    try:
        agrees(name, attention(mesh_of(devices), strategy, order, devices))
    except Exception as error:
        error.add_note(f"{name}, {strategy}, {order}, {devices=}")
        raise


def some_of_everything():
    check("everything", "ring", "zigzag", 3)
    check("functions", "all_gather", "zigzag", 2)
    check("window and everything", "ring", "contiguous", 8)


def ways_of(name):
    return WAYS if name in CAUSAL else [way for way in WAYS if way[1] == "contiguous"]


def everything(part=0, parts=1):
    """Each option with each way, under a causal mask on two numbers of devices, which are all four for each option."""
    pairs = [(name, *way) for name in OPTIONS for way in ways_of(name)]
    some = lambda i: DEVICES[1:3] if (i + i // len(WAYS)) % 2 else DEVICES[::3]
    every = [(*one, n) for i, one in enumerate(pairs) for n in (some(i) if one[0] in CAUSAL else DEVICES)]
    random.Random(0).shuffle(every)  # so that a part has some of everything
    for one in every[part::parts]:
        check(*one)


def together_with_batch_and_heads():
    """Other mesh axes cut batch and heads, whose number exceeds that of key/value heads; dropout is the same."""
    both = "everything", "functions"
    for name in both:
        problem(name)  # outside of any mesh
    kinds = itertools.cycle((AxisType.Auto, AxisType.Explicit))
    sizes = (2, 2, 2), (1, 2, 4)
    for (strategy, order), kind, names in zip(WAYS, kinds, (both, both[::-1], both[::-1], both)):
        for size, name in zip(sizes, names):  # which of the two problems is on which mesh differs by kind and way
            with jax.set_mesh(mesh_of(size, ("b", "s", "n"), kind)):
                agrees(name, attention(None, strategy, order, 2, batch_axis="b", heads_axis="n"))


def inside_shard_map(strategy, order, check_vma):
    """`ring_attention` of the problem "sinks". They are not cut: their gradient is a sum."""

    def part(arrays, lengths):
        options = dict(is_causal=True, query_seq_lengths=lengths, axis_name="s", strategy=strategy, order=order)
        return mqa_jax.ring_attention(**arrays, **options, implementation="xla", return_residual=True)

    def attend(is_causal, query_seq_lengths, **arrays):
        specs = {name: P(None, "s") if name in TOKENS else P() for name in arrays}
        cut = P(None, "s")
        run = jax.shard_map(part, mesh=mesh_of(2), in_specs=(specs, P()), out_specs=(cut, cut), check_vma=check_vma)
        return run(arrays, query_seq_lengths)

    return in_order(attend, order, 2)


def in_shard_map():
    """With the check of varying axes and without."""
    for check_vma, way in itertools.product((True, False), WAYS):
        agrees("sinks", inside_shard_map(*way, check_vma))


def outside_of_jit():
    """`jax.shard_map` may run op by op."""
    one, _, right = problem("causal")
    attend = functools.partial(mqa_jax.ring_attention, axis_name="s", is_causal=True)
    run = jax.shard_map(attend, mesh=mesh_of(2), in_specs=P(None, "s"), out_specs=P(None, "s"))
    np.testing.assert_allclose(run(*one.arrays.values()), right["out"], atol=1e-5)


def in_bfloat16():
    """DK and dV are summed over 8 devices in float32, so they err no more than on one."""
    one, *_ = problem("causal")
    one = dataclasses.replace(one, options=one.options | {"logits_soft_cap": 5.0})
    low = one.astype(jnp.bfloat16)
    same = low.astype(jnp.float32)
    right, plain = oracle.results(same, "reference"), oracle.plain_results(low)
    for strategy, order in WAYS:
        attend = attention(mesh_of(8), strategy, order, 8)
        oracle.judge(oracle.compiled(low, lambda arrays, options, f=attend: f(**arrays, **options))(low), plain, right)


def in_8_bits():
    """The scales are gathered, the keys travel in 8 bits."""
    stored = oracle.quantized(problem("everything")[0], "int8")
    plain, right = oracle.plain_program_for_values(stored, False)(stored), oracle.outputs(stored, "reference")
    for strategy, order in WAYS:
        attend = attention(mesh_of(3), strategy, order, 3)
        run = oracle.compiled(stored, lambda arrays, options, f=attend: f(**arrays, **options), differentiated=False)
        oracle.judge(run(stored), plain, right)


def under_transformations():
    """Layers in a scan that are computed again, vmap, more leading axes, and gradients of some operands only."""
    query, key, value = normal(2, 2, T, N, H), normal(2, 2, T, K, H), normal(2, 2, T, K, V)
    one_device = functools.partial(mqa_jax.dot_product_attention, is_causal=True)

    def layers(attend, query, key, value):
        layer = jax.checkpoint(lambda x, _: (x + attend(x, key, value), None))
        return jax.lax.scan(layer, query, None, length=2)[0]

    def gradients(attend):
        loss = lambda query, value: jnp.sum(jnp.sin(layers(attend, query, key, value)))
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(query, value)

    for strategy in ("ring", "all_gather"):
        options = dict(sequence_axis="s", mesh=mesh_of(2), strategy=strategy, is_causal=True, implementation="xla")
        attend = functools.partial(mqa_jax.sharded_attention, **options)
        for actual, expected in ((attend, one_device), (jax.vmap(attend), jax.vmap(one_device))):
            for x, right in zip(*map(jax.tree.leaves, (gradients(actual), gradients(expected))), strict=True):
                np.testing.assert_allclose(x, right, rtol=1e-5, atol=1e-5)
    # Of queries alone, where the table of a function, a bias and sinks have no gradient.
    options = dict(score_fn=(mqa_jax.functions.t5, normal(8, N)), bias=normal(1, N, T, T), sinks=normal(N))
    loss = lambda attend: lambda query: jnp.sum(attend(query, key, value, **options) ** 2)
    found, right = (jax.jit(jax.grad(loss(attend)))(query) for attend in (attend, one_device))
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)
