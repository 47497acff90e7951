"""Runs in a process of its own with 8 CPU devices: modules with a `sequence_axis` against the same on one device."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from collectives import collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sequences import mesh_of, normal, numbers, reordered

import mqa_jax
from mqa_jax import nnx as mqa_nnx

B, T, D, N = 2, 48, 16, 4
X, COTANGENT = normal(B, T, D), normal(B, T, D)
KEY = jax.random.key(0)
ROPE = dict(rope=mqa_jax.Rope(), attn_temperature_tuning=mqa_jax.TemperatureTuning(floor_scale=5, attn_scale=0.5))
# Settings, and arguments of a call.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "RoPE, temperature, dropout, segments, lengths, GQA": (
        dict(**ROPE, kv_heads=2, attn_pdrop=0.3, qk_ln=True),
        dict(deterministic=False, segment_ids=jnp.arange(B * T).reshape(B, T) // 20, seq_lengths=numbers(T, 31)),
    ),
    "RoPE, Falcon's ALiBi, one key more, bias, mask, MHA": (
        dict(**ROPE, alibi="falcon", add_bias_kv=True, add_zero_attn=True),
        dict(bias=normal(1, N, T, T), mask=normal(B, 1, T, T) > -1, seq_lengths=numbers(T, 31)),
    ),
    "ALiBi, soft cap, sinks, positions, functions, MQA": (
        dict(rope=mqa_jax.Rope(), alibi=True, logits_soft_cap=2.0, sinks=True, kv_heads=1),
        dict(positions=jnp.arange(T) % 13, score_fn=(mqa_jax.functions.t5, normal(8, N)), mask=normal(B, T) > -1),
    ),
    "RoPE, ALiBi, window, keys of an earlier layer": (
        dict(**ROPE, alibi=True, local_window_size=(7, 0)),
        dict(prev_layer_key_value=(normal(B, T, N, D // N), normal(B, T, N, D // N))),
    ),
    "keys of another text, dropout": (
        dict(**ROPE, kv_heads=2, causal=False, attn_pdrop=0.3),
        dict(deterministic=False, inputs_k=normal(B, 2 * T, 5)),
    ),
}
# The number of a case, how it is called, and how many devices share it; first what runs always.
WAYS: list[tuple[int, str, str, str, str, int]] = [
    (0, "linen", "Auto", "ring", "zigzag", 3),
    (1, "nnx", "manual", "all_gather", "zigzag", 3),
    (2, "linen", "Explicit", "ring", "zigzag", 8),
    (3, "nnx", "Explicit", "ring", "contiguous", 8),
    (4, "linen", "manual", "all_gather", "contiguous", 8),
    (4, "linen", "Auto", "ring", "contiguous", 8),
]
# The axes of tokens of all that has them, of a mask [B, S] too.
TOKENS = {
    **dict.fromkeys(("x", "inputs_k", "segment_ids", "cotangent", "prev_layer_key_value"), (1,)),
    **dict.fromkeys(("bias", "mask"), (2, 3)),
    "positions": (0,),
}


def axes_of(name, x):
    return (1,) if name == "mask" and x.ndim == 2 else TOKENS.get(name, ())


def call_of(api, module, params):
    """`call(params, x, **options)` is the output."""
    if api == "linen":
        return lambda params, x, **options: module.apply({"params": params}, x, **options, rngs={"dropout": KEY})[0]
    model = mqa_nnx.from_linen(module, params)
    return lambda params, x, **options: mqa_nnx.with_params(model, params)(x, **options, rngs=KEY)[0]


def results(call, params, arrays, rest):
    """Output and gradients of all parameters and of x; what is an array is an argument of the program."""

    @jax.jit
    def compute(params, arrays):
        def loss(params, x):
            others = {name: a for name, a in arrays.items() if name not in ("x", "cotangent")}
            out = call(params, x, **others, **rest)
            return jnp.sum(out * arrays["cotangent"].astype(out.dtype)), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, arrays["x"])
        return out, *gradients

    out, d_params, d_x = compute(params, arrays)
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(d_params)}
    return {"out": out, "d_x": d_x, **named}


@functools.cache
def problem(name, api):
    """The module, its parameters, the arrays and the rest of a call, and its results in float64 and on one device."""
    settings, options = CASES[name]
    are_arrays = lambda x: all(isinstance(each, jax.Array) for each in jax.tree.leaves(x))
    arrays = {"x": X, "cotangent": COTANGENT, **{name: x for name, x in options.items() if are_arrays(x)}}
    rest = {name: x for name, x in options.items() if name not in arrays}
    module = mqa_jax.GroupedQueryAttention(D, N, **settings)
    params = module.init({"params": KEY, "dropout": KEY}, X, **options)["params"]
    params = jax.tree.map(lambda x: x + normal(*x.shape) / 8, params)
    plain = results(call_of(api, module.clone(attn_impl="reference"), params), params, arrays, rest)
    with jax.enable_x64(True):
        double = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
        exact, many = jax.tree.map(double, (params, arrays))
        whole = module.clone(attn_impl="reference", param_dtype=jnp.float64)
        right = jax.tree.map(np.asarray, results(call_of(api, whole, exact), exact, many, rest))
    return module, params, arrays, rest, plain, right


def on_mesh(call, mesh, params, arrays, rest):
    """Whole arrays, cut over batch and sequence, and parameters that are cut over the heads."""

    def placed(name, x):
        axes = {} if name in ("positions", "bias", "mask", "seq_lengths") else {0: "b", 1: "s"}
        return P(*(axis if axis in mesh.shape else None for axis in map(axes.get, range(x.ndim))))

    with jax.set_mesh(mesh):
        specs = {name: jax.tree.map(functools.partial(placed, name), x) for name, x in arrays.items()}
        heads = mqa_jax.partition_specs(params, heads="n" if "n" in mesh.shape else None)
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        return results(call, jax.tree.map(place, params, heads), jax.tree.map(place, arrays, specs), rest)


def in_shard_map(call, mesh, params, arrays, rest):
    """Parts of a device: of mask and bias the rows, with all columns."""

    def cut(params, x, **options):
        arrays = {name: a for name, a in options.items() if name not in rest}
        spec = lambda name, x: P(*("s" if (i,) == axes_of(name, x)[:1] else None for i in range(x.ndim)))
        specs = {name: jax.tree.map(functools.partial(spec, name), a) for name, a in arrays.items()}
        part = lambda params, x, arrays: call(params, x, **arrays, **rest)
        run = jax.shard_map(part, mesh=mesh, in_specs=(P(), P(None, "s"), specs), out_specs=P(None, "s"))
        return run(params, x, arrays)

    return results(cut, params, arrays, rest)


def check(number, api, way, strategy, order, devices):
    name = [*CASES][number]
    module, params, arrays, rest, plain, right = problem(name, api)
    is_one = way == "manual" or devices < 8
    kind = AxisType.Explicit if way == "Explicit" else AxisType.Auto
    mesh = mesh_of(devices, kind=kind) if is_one else mesh_of((2, 2, 2), ("b", "s", "n"), kind)
    # On Explicit axes the types say it.
    others = {} if is_one or way == "Explicit" else dict(batch_axis="b", heads_axis="n")
    setting = mqa_jax.SequenceAxis("s", strategy=strategy, order=order, **others)
    call = call_of(api, module.clone(sequence_axis=setting, attn_impl="xla"), params)
    share = mesh.shape["s"]
    if order == "zigzag":
        change = lambda name, x: reordered(x, axes_of(name, x), lambda x, axis: mqa_jax.zigzag(x, share, axis))
        arrays = {name: jax.tree.map(functools.partial(change, name), x) for name, x in arrays.items()}
    actual = (in_shard_map if way == "manual" else on_mesh)(call, mesh, params, arrays, rest)
    actual = jax.tree.map(np.asarray, actual)
    if order == "zigzag":
        actual |= {name: mqa_jax.unzigzag(actual[name], share) for name in ("out", "d_x")}
    try:
        oracle.judge(actual, plain, right)
    except AssertionError as error:
        error.add_note(f"{name}, {api}, {way}, {strategy}, {order}, {devices=}")
        raise


def parameters():
    """They are made without a mesh, and from texts that devices cannot share; of others the output is right as well."""
    whole = mqa_jax.GroupedQueryAttention(D, N, rope=mqa_jax.Rope())
    module = whole.clone(sequence_axis=mqa_jax.SequenceAxis("s", order="zigzag", batch_axis="b"))
    (expected, *_), params = jax.jit(whole.init_with_output)(KEY, X)
    shapes = jax.tree.map(jnp.shape, params)
    for mesh, x in ((None, X[:1, :5]), (mesh_of((2, 2), ("b", "s")), X[:1]), (mesh_of((2, 4), ("b", "s")), X[:, :4])):
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            assert jax.tree.map(jnp.shape, jax.eval_shape(module.init, KEY, x)) == shapes
    with jax.set_mesh(mesh_of((2, 2), ("b", "s"))):
        (out, *_), same = jax.jit(module.init_with_output)(KEY, mqa_jax.zigzag(X, 2))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    np.testing.assert_allclose(mqa_jax.unzigzag(np.asarray(out), 2), expected, atol=1e-5)


def nothing_else_is_sent():
    """Keys in a ring, and the sum of the output over the heads: no tokens, positions or angles."""
    module = mqa_jax.GroupedQueryAttention(D, N, kv_heads=2, rope=mqa_jax.Rope())
    params, mesh = jax.jit(module.init)(KEY, X), mesh_of((2, 2, 2), ("b", "s", "n"))
    module = module.clone(sequence_axis=mqa_jax.SequenceAxis("s", order="zigzag", batch_axis="b", heads_axis="n"))
    with jax.set_mesh(mesh):
        specs = mqa_jax.partition_specs(params, heads="n", kv_heads="n"), P("b", "s")
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        run = lambda params, x: module.apply(params, x)[0]
        program = jax.jit(run, in_shardings=shardings, out_shardings=shardings[1]).lower(params, X).compile()
    tokens = B // 2 * T // 2
    assert collectives(program) == {"collective-permute": [2 * tokens * D // N * 4], "all-reduce": [tokens * D * 4]}
