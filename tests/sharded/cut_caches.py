"""Runs in a process of its own with 8 CPU devices: decoding of modules with a `sequence_axis` against one device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from collectives import collectives
from flax import nnx
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sequences import mesh_of, normal, numbers

import mqa_jax
from mqa_jax import nnx as mqa_nnx

B, T, S, D, N, H = 2, 13, 24, 16, 4, 32
X = normal(B, T, D)
KEY = jax.random.key(0)
# Tokens of each call, and how many of them count: with padding, over the borders of parts of the cache, and a step.
CALLS = [(0, 6, numbers(6, 2)), (6, 6, numbers(4, 6)), (12, 1, None)]
# Settings, and arguments of each call.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all at once, GQA": (
        dict(
            rope=mqa_jax.Rope(),
            attn_temperature_tuning=mqa_jax.TemperatureTuning(floor_scale=5, attn_scale=0.5),
            alibi=True,
            sinks=True,
            local_window_size=(9, 0),
            logits_soft_cap=2.0,
            attn_pdrop=0.3,
            qk_ln=True,
            kv_heads=2,
        ),
        dict(
            deterministic=False,
            bias=normal(1, N, S, S),
            mask=normal(B, 1, S, S) > -1,
            score_fn=(mqa_jax.functions.t5, normal(8, N)),
            mask_fn=(mqa_jax.functions.sink_and_window, 2, 8),
        ),
    ),
    "Falcon's ALiBi, one key more, MHA": (
        dict(rope=mqa_jax.Rope(), alibi="falcon", add_bias_kv=True, add_zero_attn=True),
        dict(bias=normal(B, N, 1, S), mask=normal(B, S) > -1),
    ),
    "8 bits, MQA": (dict(rope=mqa_jax.Rope(), kv_heads=1, cache_dtype="int8"), {}),
    "RoPE": (dict(rope=mqa_jax.Rope(), kv_heads=2), {}),
    "temperature": (dict(attn_temperature_tuning=mqa_jax.TemperatureTuning(floor_scale=3, attn_scale=2.0)), {}),
    "ALiBi": (dict(alibi=True), {}),
    "sinks": (dict(sinks=True), {}),
    "window": (dict(local_window_size=(3, 0)), {}),
    "not causal, window": (dict(local_window_size=(3, 2), causal=False), {}),
    "dropout": (dict(attn_pdrop=0.3), dict(deterministic=False)),
    "bias": ({}, dict(bias=normal(1, N, S, S))),
    "mask": ({}, dict(mask=normal(B, N, S, S) > -1)),
    "functions": ({}, dict(score_fn=(mqa_jax.functions.t5, normal(8, N)), mask_fn=(mqa_jax.functions.dilated, 2))),
}
ALONE = [*CASES][3:]
# The case, the API, the kind of mesh axes, and how many cut batch, positions and heads; first what runs always.
WAYS: list[tuple[str, str, str, tuple[int, int, int]]] = [
    ("all at once, GQA", "linen", "Auto", (2, 2, 2)),
    ("Falcon's ALiBi, one key more, MHA", "nnx", "Explicit", (2, 4, 1)),
    ("8 bits, MQA", "linen", "manual", (1, 8, 1)),
    ("Falcon's ALiBi, one key more, MHA", "linen", "Explicit", (1, 2, 4)),
    ("all at once, GQA", "linen", "manual", (1, 3, 1)),
    ("8 bits, MQA", "linen", "Explicit", (2, 2, 2)),
    ("8 bits, MQA", "nnx", "Auto", (1, 8, 1)),
    ("all at once, GQA", "linen", "Auto", (1, 2, 4)),
    ("Falcon's ALiBi, one key more, MHA", "nnx", "manual", (1, 4, 1)),
]


def step_of(api, module, params, rest) -> tuple[Any, Any, Any]:
    """`step(params, cache, x, arrays)` is the output and the next cache; an empty cache; its parameters."""
    if api == "linen":

        def step(params, cache, x, arrays):
            variables, options = {"params": params, "cache": cache}, dict(mutable=["cache"], rngs={"dropout": KEY})
            (out, *_), state = module.apply(variables, x, **arrays, **rest, **options)
            return out, state["cache"]

        return step, module.init_cache(B, S), params
    model = mqa_nnx.from_linen(module, params)
    mqa_nnx.init_cache(model, B, S)
    graph, cache, params = nnx.split(model, nnx.Cache, ...)  # type: ignore[misc]

    def step_of_model(params, cache, x, arrays):
        model = nnx.merge(graph, cache, params)
        return model(x, **arrays, **rest, rngs=KEY)[0], nnx.state(model, nnx.Cache)

    return step_of_model, cache, params


def results(step, cache, params, arrays, calls=CALLS, place=lambda x: x):
    """Outputs of all calls."""
    step, outputs = jax.jit(step, donate_argnums=1), {}
    x = X.astype(jax.tree.leaves(params)[0].dtype)
    for start, count, lengths in calls:
        given = {**arrays, "seq_lengths": lengths}
        outputs[f"from {start}"], cache = step(params, cache, place(x[:, start : start + count]), given)
    return jax.tree.map(np.asarray, outputs), cache


@functools.cache
def problem(name, calls=3):
    """The module, its parameters, the arrays and the rest of a call, and the results on one device and in float64."""
    settings, options = CASES[name]
    arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
    rest = {name: x for name, x in options.items() if name not in arrays}
    module = mqa_jax.GroupedQueryAttention(D, N, **settings)
    params = module.init({"params": KEY, "dropout": KEY}, X, deterministic=True)["params"]
    params = jax.tree.map(lambda x: x + normal(*x.shape) / 8, params)
    run = lambda module, params, arrays: results(*step_of("linen", module, params, rest), arrays, CALLS[:calls])[0]
    plain = run(module.clone(attn_impl="reference"), params, arrays)
    with jax.enable_x64(True):
        double = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        exact = module.clone(attn_impl="reference", param_dtype=jnp.float64)
        right = run(exact, *jax.tree.map(double, (params, arrays)))
    return module, params, arrays, rest, plain, right


def placed(tree, specs, mesh):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


def on_mesh(step, cache, params, arrays, calls, mesh, has_kv_heads):
    """Parameters cut over the heads, x over the batch, the cache over all three."""
    axes = dict(heads="n", kv_heads="n" if has_kv_heads else None)
    with jax.set_mesh(mesh):
        specs = mqa_jax.partition_specs(cache, batch="b", kv_heads=axes["kv_heads"], sequence="s")
        mine = placed(cache, specs, mesh), placed(params, mqa_jax.partition_specs(params, **axes), mesh)
        place = lambda x: jax.device_put(x, NamedSharding(mesh, P("b")))
        outputs, after = results(step, *mine, arrays, calls, place)
    for x, spec in zip(jax.tree.leaves(after), jax.tree.leaves(specs), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (x.sharding, spec)
    return outputs


def in_shard_map(step, cache, params, arrays, calls, mesh):
    """Whole tokens, and the device's part of the cache."""
    specs = mqa_jax.partition_specs(cache, sequence="s")
    cut = jax.shard_map(step, mesh=mesh, in_specs=(P(), specs, P(), P()), out_specs=(P(), specs))
    return results(cut, cache, params, arrays, calls)[0]


def check(name, api, way, sizes, calls=3):
    module, params, arrays, rest, plain, right = problem(name, calls)
    kind = AxisType.Explicit if way == "Explicit" else AxisType.Auto
    mesh = mesh_of(sizes, ("b", "s", "n"), kind)
    # On Explicit axes the types say it.
    others = dict(batch_axis="b", heads_axis="n") if way == "Auto" else {}
    cut = module.clone(sequence_axis=mqa_jax.SequenceAxis("s", **others), attn_impl="xla")
    given = *step_of(api, cut, params, rest), arrays, CALLS[:calls], mesh
    kv_heads = module.kv_heads or N
    actual = in_shard_map(*given) if way == "manual" else on_mesh(*given, kv_heads % sizes[2] == 0)
    try:
        oracle.judge(actual, plain, right)
    except AssertionError as error:
        error.add_note(f"{name}, {api}, {way}, {sizes}")
        raise


def each_alone():
    for i, name in enumerate(ALONE):
        check(name, "linen", ("manual", "Auto")[i % 2], (1, (3, 8, 2)[i % 3], 1), calls=2)


def whole_and_cut(**axes):
    """A module, its parameters, and the same with a `sequence_axis`."""
    module = mqa_jax.GroupedQueryAttention(D, N, kv_heads=2, head_dim=H, rope=mqa_jax.Rope())
    return module, module.init(KEY, X)["params"], module.clone(sequence_axis=mqa_jax.SequenceAxis("s", **axes))


def the_cache_stays():
    """Of a step, and of steps in a loop: what is sent is a formula, and the cache is written where it lies."""
    _, params, cut = whole_and_cut(batch_axis="b", heads_axis="n")
    mesh, length = mesh_of((2, 2, 2), ("b", "s", "n")), 2**15
    step, _, _ = step_of("linen", cut, params, {})

    def one(params, cache, x):
        return step(params, cache, x, {})[::-1]

    def several(params, cache, x):
        return jax.lax.scan(lambda cache, x: one(params, cache, x[:, None]), cache, jnp.moveaxis(x, 1, 0))

    cache = jax.eval_shape(lambda: cut.init_cache(B, length))
    specs = (
        mqa_jax.partition_specs(params, heads="n", kv_heads="n"),
        mqa_jax.partition_specs(cache, batch="b", kv_heads="n", sequence="s"),
        P("b"),
    )
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        for function, tokens in ((one, 1), (one, 5), (several, 1)):
            x = jax.ShapeDtypeStruct((B, 3 if function is several else tokens, D), jnp.float32)
            compiled = jax.jit(function, in_shardings=shardings, donate_argnums=1)
            program: Any = compiled.lower(params, cache, x).compile()
            rows = B // 2 * tokens
            sums = [rows * N // 2 * 4, rows * N // 2 * (H + 1) * 4, rows * D * 4]  # the last is that of the output
            assert collectives(program) == {"all-reduce": sorted(sums)}, collectives(program)
            assert program.as_text().partition("\n")[0].count("-alias)") == len(cache), "not in place"
            keys = B // 2 * length // 2 * H * 4  # bytes of those of a device
            assert program.memory_analysis().temp_size_in_bytes < keys // 2


def applied(module, params, cache, x, **options):
    (out, *_), state = module.apply({"params": params, "cache": cache}, x, mutable=["cache"], **options)
    return out, state["cache"]


run = jax.jit(applied, static_argnums=0)


def a_cache_that_is_not_cut():
    """On Auto axes it is cut from the first call on."""
    whole, params, cut = whole_and_cut()
    expected, _ = run(whole, params, whole.init_cache(B, S), X)
    with jax.set_mesh(mesh_of(8)):
        out, cache = run(cut, params, cut.init_cache(B, S), X)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert cache["cached_key"].sharding.spec[1] == "s"


def full_caches():
    """A full row is NaN and holds what it held, until it is reset; `check_cache` sees it, and without jit it raises."""
    whole, params, cut = whole_and_cut()
    length, mesh = 12, mesh_of(4)
    _, before = run(whole, params, whole.init_cache(B, length), X[:, :10], seq_lengths=numbers(10, 4))
    expected, following = run(whole, params, before, X[:, 10:])
    specs = mqa_jax.partition_specs(before, sequence="s")
    with jax.set_mesh(mesh):
        mine = placed(before, specs, mesh)
        out, after = run(cut, params, mine, X[:, 10:])
        error, _ = jax.jit(checkify.checkify(mqa_jax.check_cache))(after)
        with pytest.raises(ValueError, match=r"cache is full: .*max_length=12"):
            applied(cut, params, mine, X[:, 10:])
    inside = jax.shard_map(
        functools.partial(applied, cut), mesh=mesh, in_specs=(P(), specs, P()), out_specs=(P(), specs)
    )
    assert "The cache is full: cache_index=13 after this call, max_length=12" in str(error.get())
    with pytest.raises(ValueError, match=r"The cache is full: cache_index=\[13 +7\] after this call, max_length=12"):
        mqa_jax.check_cache(after)
    for found, cache in ((out, after), jax.jit(inside)(params, before, X[:, 10:])):
        assert np.isnan(np.asarray(found)[0]).all()
        np.testing.assert_allclose(np.asarray(found)[1], expected[1], atol=1e-5)
        np.testing.assert_array_equal(cache["cached_key"][0], before["cached_key"][0])
    rows, reset = jnp.array([1, 0]), jnp.array([False, True])
    changed = lambda cache: mqa_jax.reset_cache(mqa_jax.reorder_cache(cache, rows), reset)
    expected, _ = run(whole, params, changed(following), X[:, 10:])
    with jax.set_mesh(mesh):
        out, _ = run(cut, params, changed(after), X[:, 10:])
    np.testing.assert_allclose(out, expected, atol=1e-5)
