"""Runs in a process of its own with 8 CPU devices: sequences that are cut over devices, against one device."""

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.sharding import AxisType, NamedSharding
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
    check("everything", "all_gather", "zigzag", 2)
    check("window and everything", "ring", "contiguous", 8)
    check("functions", "ring", "zigzag", 2)


def ways_of(name):
    return WAYS if name in CAUSAL else [way for way in WAYS if way[1] == "contiguous"]


def everything(part=0, parts=1):
    """Each option with each way, on each number of devices."""
    every = [(name, *way, n) for name in OPTIONS for way in ways_of(name) for n in DEVICES]
    for one in every[part::parts]:
        check(*one)


def together_with_batch_and_heads():
    """Other mesh axes cut batch and heads, whose number exceeds that of key/value heads; dropout is the same."""
    for name in ("everything", "functions"):
        problem(name)  # outside of any mesh
    for (strategy, order), kind in zip(WAYS, itertools.cycle((AxisType.Auto, AxisType.Explicit))):
        for sizes in ((2, 2, 2), (1, 2, 4)):
            mesh = mesh_of(sizes, ("b", "s", "n"), kind)
            with jax.set_mesh(mesh):
                agrees("everything", attention(None, strategy, order, 2, batch_axis="b", heads_axis="n"))
                agrees("functions", attention(None, strategy, order, 2, batch_axis="b", heads_axis="n"))


def in_shard_map():
    """`ring_attention`, with the check of varying axes and without; the sinks are not cut: their gradient is a sum."""
    one, plain, right = problem("sinks")
    specs = {name: P(None, "s") if name in TOKENS else P() for name in one.arrays}
    for check_vma, (strategy, order) in itertools.product((True, False), WAYS):
        mesh = mesh_of(2)

        def attend(check=check_vma, strategy=strategy, order=order, mesh=mesh, **given):
            arrays = {name: given.pop(name) for name in one.arrays}

            def part(arrays, lengths):
                options = dict(is_causal=True, query_seq_lengths=lengths, axis_name="s", strategy=strategy, order=order)
                return mqa_jax.ring_attention(**arrays, **options, implementation="xla", return_residual=True)

            run = jax.shard_map(
                part, mesh=mesh, in_specs=(specs, P()), out_specs=(P(None, "s"), P(None, "s")), check_vma=check
            )
            return run(arrays, given["query_seq_lengths"])

        attend = in_order(attend, order, 2)
        actual = oracle.compiled(one, lambda arrays, options, f=attend: f(**arrays, **options))(one)
        oracle.judge(actual, plain, right)


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
    for strategy, order in WAYS:
        attend = attention(mesh_of(3), strategy, order, 3)
        run = oracle.compiled(stored, lambda arrays, options, f=attend: f(**arrays, **options), differentiated=False)
        oracle.judge(run(stored), oracle.plain_outputs(stored), oracle.outputs(stored, "reference"))


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


# -- decoding ---------------------------------------------------------------------------------------------------------


def decoding(devices=8, tokens=1, dtype=jnp.float32):
    """Steps of decoding with a cache that is cut over devices, against attention to all of it on one."""
    mesh, slots = mesh_of(devices), T
    cache = jnp.zeros((B, slots, K, H), dtype), jnp.zeros((B, slots, K, H), dtype)
    lengths = numbers(0, slots - 3 * tokens)
    options: Any = dict(sinks=normal(N), alibi_slopes=normal(N) / 8)

    def step(query, key, value, lengths, cache):
        cache = tuple(
            mqa_jax.append_to_part(part, x, lengths, axis_name="s") for part, x in zip(cache, (key, value), strict=True)
        )
        limits: Any = dict(is_causal=True, query_offset=lengths, key_value_seq_lengths=lengths + tokens)
        attend: Any = functools.partial(mqa_jax.decode_attention, axis_name="s", implementation="xla")
        return attend(query, *cache, **limits, **options, local_window_size=(11, 0), return_residual=True), cache

    cut = P(None, "s")
    run = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(), P(), (cut, cut)), out_specs=(P(), (cut, cut)))
    )
    whole: Any = cache
    for _ in range(3):
        query, key, value = (normal(B, tokens, heads, H).astype(dtype) for heads in (N, K, K))
        rows, columns = jnp.arange(B)[:, None], lengths[:, None] + jnp.arange(tokens)
        whole = tuple(x.at[rows, columns].set(new) for x, new in zip(whole, (key, value)))
        found, cache = run(query, key, value, lengths, cache)
        limits = dict(is_causal=True, query_offset=lengths, key_value_seq_lengths=lengths + tokens)
        one = oracle.Problem(
            dict(query=query, key=whole[0], value=whole[1], **options), dict(limits, local_window_size=(11, 0))
        )
        actual = dict(zip(("out", "log_sum_exp"), found))
        oracle.judge(actual, oracle.plain_outputs(one), oracle.outputs(one, "reference"))
        jax.tree.map(np.testing.assert_array_equal, cache, whole)
        lengths = lengths + tokens
    text = run.lower(query, key, value, lengths, cache).compile().as_text()
    row = B * tokens * N * 4
    assert collectives(text) == {"all-reduce": sorted([row, row * (H + 1)])}
    _, cache = run(query, key, value, numbers(slots, 0), cache)  # beyond the end, where nobody can raise
    assert np.isnan(np.asarray(cache[0], np.float32)[0, -1]).all()
    assert not np.isnan(np.asarray(cache[0], np.float32)[1]).any()


def gradients_of_decoding():
    """They are summed over devices where the operand is shared."""
    one, plain, right = problem("sinks")
    mesh, cut = mesh_of(8), P(None, "s")
    specs = {name: cut if name in ("key", "value") else P() for name in one.arrays}

    def part(arrays: Any, lengths):
        options: Any = dict(is_causal=True, query_seq_lengths=lengths, axis_name="s", implementation="xla")
        return mqa_jax.decode_attention(**arrays, **options, return_residual=True)

    for check_vma in (True, False):
        run = jax.shard_map(part, mesh=mesh, in_specs=(specs, P()), out_specs=(P(), P()), check_vma=check_vma)
        attend = lambda arrays, options, run=run: run(arrays, options["query_seq_lengths"])
        oracle.judge(oracle.compiled(one, attend)(one), plain, right)


# -- what is sent -----------------------------------------------------------------------------------------------------

BYTES = {"f32": 4, "bf16": 2, "s32": 4}


def collectives(text):
    """Of each kind, the sizes of the results in bytes, as the program has them: once for all turns of a loop."""
    names = "all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter"
    found: dict[str, list[int]] = {}
    for name in names:
        for dtype, shape in re.findall(rf"= (\w+)\[([\d,]*)\]\S* {name}\(", text):
            size = int(np.prod([int(n) for n in shape.split(",") if n])) * BYTES[dtype]
            found.setdefault(name, []).append(size)
    return {name: sorted(sizes) for name, sizes in found.items()}


def compiled(devices, strategy, order, dtype=jnp.float32, tokens=256, gradient=True, **options):
    mesh = mesh_of(devices)
    shape = lambda heads: jax.ShapeDtypeStruct((1, tokens, heads, H), dtype, sharding=NamedSharding(mesh, P(None, "s")))
    options = dict(sequence_axis="s", mesh=mesh, strategy=strategy, order=order, implementation="xla", **options)
    attend = functools.partial(mqa_jax.sharded_attention, **options)
    loss = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32))
    function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else attend
    return jax.jit(function).lower(shape(N), shape(K), shape(K)).compile()


def collectives_are_those_of_the_formula():
    """M bytes are a device's keys and values, Md their float32 gradients. A message in a loop is there once."""
    for order, devices in [("contiguous", 8), ("zigzag", 4)]:
        size = full = 2 * 256 * K * H // devices * 4
        whole = size * devices // 2

        def sent(strategy, gradient, order=order, devices=devices):
            return collectives(compiled(devices, strategy, order, gradient=gradient, is_causal=True).as_text())

        assert sent("ring", False) == {"collective-permute": [size]}
        # Forward; keys of the backward pass, their gradients behind them, and the way home.
        assert sent("ring", True) == {"collective-permute": sorted([size, size, full, full])}
        assert sent("all_gather", False) == {"all-gather": [whole, whole]}
        found = sent("all_gather", True)
        assert found == {"all-gather": [whole] * 2, "reduce-scatter": [full // 2] * 2}, found  # XLA:CPU joins 2 and 2


def a_window_ends_the_journey():
    """The sends of a ring of 8 devices with 32 tokens each, by how far the window reaches to the left and right."""
    sends = {
        (0, 0): [],  # each its own keys
        (32, 0): [1],  # those of one device before
        (33, 0): [1, 1],
        (0, 5): [-1, 1],  # begins with those of the device after
        (40, 32): [-1, 1, 1, 1],
        (-1, 0): [1] * 7,
        (120, 120): [1] * 7,
    }
    for window, expected in sends.items():
        text = str(
            jax.make_jaxpr(
                lambda x, window=window: mqa_jax.sharded_attention(
                    x, x, x, sequence_axis="s", mesh=mesh_of(8), local_window_size=window, implementation="xla"
                )
            )(jnp.zeros((1, 256, 1, 8)))
        )
        first = re.findall(r"perm=\(\(0, (\d)\)", text)
        turns = [int(n) for n in re.findall(r"length=(\d+)", text)]
        found = [-1] * first.count("7") + [1] * sum(turns)
        assert found == expected, f"{window}: {found}"


def memory_is_linear():
    """Temporary memory of output and gradients of twice as many tokens is twice as much."""
    for strategy, order in WAYS:
        small, large = (
            compiled(4, strategy, order, tokens=tokens, is_causal=True).memory_analysis().temp_size_in_bytes
            for tokens in (8192, 16384)
        )
        assert large <= 2.1 * small, f"{strategy}, {order}: {small}, {large}"
