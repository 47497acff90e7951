"""Runs in a process of its own with 8 CPU devices: attention on meshes against attention on one device."""

import functools
import itertools
import random
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import option_space
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mqa_jax

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
B, T, S, N, H = 8, 24, 40, 8, 16

# Sizes and names of the mesh, and how it cuts the batch, the queries and the heads.
CUTS: dict[str, tuple[tuple[int, ...], tuple[str, ...], tuple[Any, Any, Any]]] = {
    "batch": ((8,), ("b",), ("b", None, None)),
    "heads": ((4,), ("n",), (None, None, "n")),
    "heads by 8": ((8,), ("n",), (None, None, "n")),
    "batch and heads": ((2, 4), ("b", "n"), ("b", None, "n")),
    "queries": ((8,), ("t",), (None, "t", None)),
    "3 devices, queries": ((3,), ("t",), (None, "t", None)),
    "all three": ((2, 2, 2), ("b", "t", "n"), ("b", "t", "n")),
    "one axis of size 1": ((1, 4), ("b", "n"), ("b", None, "n")),
    "two mesh axes for the heads": ((2, 4), ("x", "y"), (None, None, ("x", "y"))),
    "two mesh axes, the other way round": ((2, 4), ("x", "y"), (None, None, ("y", "x"))),
}
OPTIONS: dict[str, Any] = {
    "causal": lambda: dict(is_causal=True, query_offset=7),
    "causal, dropout": lambda: dict(is_causal=True, query_offset=7, dropout_rate=0.3, dropout_rng=jax.random.key(1)),
    "everything": lambda: {
        "bias": normal(1, N, 1, S),
        "mask": normal(B, 1, T, S) > -1,
        "sinks": normal(N),
        "alibi_slopes": normal(N) / 8,
        "logits_soft_cap": 2.0,
        "local_window_size": (20, 9),
        "query_seq_lengths": jnp.arange(B) + 12,
        "key_value_seq_lengths": jnp.arange(B) * 4,
        "query_segment_ids": jnp.arange(B * T).reshape(B, T) // 50,
        "key_value_segment_ids": jnp.arange(B * S).reshape(B, S) // 80,
        "dropout_rate": 0.3,
        "dropout_rng": jax.random.key(1),
        "score_fn": option_space.relative,
        "score_fn[1]": normal(B, N, 41),
        "score_fn[2]": 1 + normal(N) / 4,
        "mask_fn": option_space.beginning_and_neighbours,
        "mask_fn[1]": jnp.arange(B) * 4,
        "mask_fn[2]": 9,
    },
}
ARRAYS = oracle.DIFFERENTIABLE[3:]  # the options with gradients


# How a mesh of 2 x 3 devices cuts arrays [8, 24, 6, 16] and two [8, 40, 2, 16], and the message.
WRONG_TYPES: list[tuple[dict[str, P], str]] = [
    ({"query": P(None, None, None, "b")}, r"features may not: query has the type f\S*32\[8,24,6,16@b\]. Use jax.shard"),
    ({"value": P(None, None, None, "b")}, "features may not: value"),
    ({"key": P(None, "b")}, r"need mqa_jax.sharded_attention: key has the type f\S*32\[8,40@b,2,16\]. To gather"),
    ({"query": P(None, None, "n")}, r"must divide one another: kv_heads=2, parts=3, of mesh axes \('n',\)"),
]


def mesh_of(sizes, names, kind=AxisType.Auto):
    count = int(np.prod(sizes))
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(names), devices=jax.devices()[:count])


def spec_of(cut, letters, shape, kv_heads, mesh):
    """Of an array with these axes; keys are cut as the queries where their heads divide."""
    axes = dict(zip("btn", cut))
    size = np.prod([mesh.shape[name] for name in np.ravel(cut[2]) if name is not None])
    axes["k"] = cut[2] if kv_heads % size == 0 else None
    return P(*(axes.get(letter) if n != 1 else None for letter, n in zip(letters, shape)))


def problem(kv_heads, options):
    rest = OPTIONS[options]()
    arrays = dict(query=normal(B, T, N, H), key=normal(B, S, kv_heads, H), value=normal(B, S, kv_heads, H))
    arrays |= {name: rest.pop(name) for name in ARRAYS if name in rest}
    letters = dict(query="btnh", key="bskh", value="bskh", bias="bnts", alibi_slopes="n", sinks="n")
    letters |= {"score_fn[1]": "...", "score_fn[2]": "."}  # whole on each device
    return arrays, {name: letters[name] for name in arrays}, rest


def results(arrays, options, implementation="xla"):
    """Output, log-sum-exp, all gradients, and the tangents, by one forward pass."""

    def function(arrays):
        given = oracle.arguments(arrays, options)
        return mqa_jax.dot_product_attention(**given, implementation=implementation, return_residual=True)

    (out, log_sum_exp), tangents = jax.linearize(function, arrays)
    seen = jnp.isfinite(log_sum_exp)
    cotangents = jnp.cos(out), jnp.where(seen, jnp.sin(jnp.where(seen, log_sum_exp, 0)), 0)
    (gradients,) = jax.linear_transpose(tangents, arrays)(cotangents)
    return (out, log_sum_exp), gradients, tangents(jax.tree.map(jnp.cos, arrays))


def close(actual, expected, message):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-4, atol=2e-5, err_msg=message)


def placed(arrays, letters, cut, kv_heads, mesh):
    put = lambda name, x: jax.device_put(x, NamedSharding(mesh, spec_of(cut, letters[name], x.shape, kv_heads, mesh)))
    return {name: put(name, x) for name, x in arrays.items()}


@functools.cache
def solved(kv_heads, options):
    """A problem with its results on one device."""
    arrays, letters, rest = problem(kv_heads, options)
    return arrays, letters, rest, jax.jit(functools.partial(results, options=rest))(arrays)


def against_one_device(part=0, parts=1):
    """Every cut with few options and with all; each with one number of key/value heads."""
    kinds = AxisType.Auto, AxisType.Explicit
    every = [*enumerate(itertools.product(CUTS, kinds, ("causal, dropout", "everything")))]
    random.Random(0).shuffle(every)  # so that a part has some of everything
    for number, (name, kind, options) in every[part::parts]:
        kv_heads = (1, 4, 8)[(number + number // 4) % 3]
        arrays, letters, rest, expected = solved(kv_heads, options)
        sizes, names, cut = CUTS[name]
        mesh = mesh_of(sizes, names, kind)
        with jax.set_mesh(mesh):
            mine = placed(arrays, letters, cut, kv_heads, mesh)
            actual = jax.jit(functools.partial(results, options=rest))(mine)
        close(actual, expected, f"{name}, {kind}, {options}, {kv_heads=}")
        for x, like in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(mine)):
            assert kind == AxisType.Auto or x.sharding.spec == like.sharding.spec


def in_shard_map():
    """By hand, with the check of varying axes and without."""
    for kv_heads in (2, 8):
        arrays, letters, rest, expected = solved(kv_heads, "causal")
        for sizes, names, cut, check in [
            ((2,), ("b",), ("b", None, None), True),
            ((2,), ("n",), (None, None, "n"), True),
            ((2, 2), ("b", "n"), ("b", None, "n"), True),
            ((2, 2), ("b", "n"), ("b", None, "n"), False),
        ]:
            mesh = mesh_of(sizes, names)
            specs = {name: spec_of(cut, letters[name], x.shape, kv_heads, mesh) for name, x in arrays.items()}
            rows = P(cut[0], None, cut[2])
            run = jax.shard_map(
                functools.partial(results, options=rest),
                mesh=mesh,
                in_specs=(specs,),
                out_specs=((rows, rows), specs, (rows, rows)),
                check_vma=check,
            )
            close(jax.jit(run)(arrays), expected, f"{names=}, {check=}, {kv_heads=}")


def a_shared_operand_in_shard_map():
    """Slopes that no mesh axis cuts: JAX sums their gradient, because they are made to vary outside the primitive."""
    arrays, _, _ = problem(2, "causal")
    slopes = normal(N)
    loss = lambda slopes, arrays: jnp.sum(mqa_jax.dot_product_attention(**arrays, alibi_slopes=slopes) ** 2)
    mesh = mesh_of((4,), ("b",))

    def mapped(slopes, arrays):
        body = lambda slopes, arrays: jax.lax.psum(loss(slopes, arrays), "b")
        return jax.shard_map(body, mesh=mesh, in_specs=(P(), P("b")), out_specs=P())(slopes, arrays)

    close(jax.jit(jax.grad(mapped))(slopes, arrays), jax.grad(loss)(slopes, arrays), "slopes")


def what_is_refused():
    """With the rule, the values and the remedy."""
    arrays, letters, _ = problem(8, "causal")
    function = lambda arrays: mqa_jax.dot_product_attention(**arrays, implementation="xla")
    mesh = mesh_of((2, 4), ("b", "n"))
    partly = jax.shard_map(function, mesh=mesh, in_specs=P("b"), out_specs=P("b"), axis_names={"b"}, check_vma=False)
    with pytest.raises(
        NotImplementedError, match=r"all mesh axes to be manual.*\['b'\], others {'n': 4}. Leave out `ax"
    ):
        jax.jit(partly).lower(arrays)
    explicit = mesh_of((2, 3), ("b", "n"), AxisType.Explicit)
    sizes = dict(query=(B, T, 6, H), key=(B, S, 2, H), value=(B, S, 2, H))
    for cut, message in WRONG_TYPES:
        put = lambda name, cut=cut: NamedSharding(explicit, cut.get(name, P()))
        wrong = {name: jax.device_put(normal(*shape), put(name)) for name, shape in sizes.items()}
        with pytest.raises(ValueError, match=message):
            function(wrong)
    mine = placed(arrays, letters, ("b", None, "n"), 8, mesh)
    with pytest.raises(NotImplementedError, match=r"Auto mesh axes for jax.export:.*num_devices=8.*Use Explicit mesh"):
        jax.export.export(jax.jit(function))(mine)


def the_same_entries_are_dropped():
    """Bit for bit, wherever the arrays are cut."""
    arrays, letters, rest = problem(8, "causal, dropout")
    ones = {name: jnp.ones_like(x) for name, x in arrays.items()} | {"query": jnp.zeros_like(arrays["query"])}
    function = lambda arrays: mqa_jax.dot_product_attention(**arrays, **rest, implementation="xla")
    expected = jax.jit(function)(ones)
    for name in ("heads by 8", "3 devices, queries", "all three", "two mesh axes, the other way round"):
        sizes, names, cut = CUTS[name]
        mesh = mesh_of(sizes, names)
        with jax.set_mesh(mesh):
            actual = jax.jit(function)(placed(ones, letters, cut, 8, mesh))
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-6, err_msg=name)


def under_vmap():
    """Over an axis that is cut, around a cut batch, and with keys that are not mapped."""
    arrays = normal(8, 4, T, N, H), normal(8, 4, S, 2, H), normal(8, 4, S, 2, H)
    function = functools.partial(mqa_jax.dot_product_attention, is_causal=True, implementation="xla")
    loss = lambda *arrays: jnp.sum(jnp.sin(function(*arrays)))
    for axes, kind in itertools.product([(0, 0, 0), (0, None, None)], (AxisType.Auto, AxisType.Explicit)):
        mine = tuple(x if axis == 0 else x[0] for x, axis in zip(arrays, axes))
        run = jax.vmap(jax.value_and_grad(loss, argnums=(0, 1, 2)), in_axes=axes)
        expected = jax.jit(run)(*mine)
        for spec in (P("m"), P(None, "m")):
            mesh = mesh_of((4,), ("m",), kind)
            shardings = [NamedSharding(mesh, spec if axis == 0 else P(*spec[1:])) for axis in axes]
            with jax.set_mesh(mesh):
                actual = jax.jit(run)(*map(jax.device_put, mine, shardings))
            close(actual, expected, f"{axes=}, {spec=}, {kind}")


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + mqa_jax.GroupedQueryAttention(32, 8, kv_heads=4, causal=True)(x)[0], None


def scanned_modules():
    """Layers in nn.scan and nn.remat, cut by a mesh of batch and heads."""
    layers = nn.scan(
        nn.remat(Layer, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
    )()
    x = normal(8, 16, 32)
    variables = layers.init(jax.random.key(0), x, None)
    loss = lambda variables, x: jnp.sum(layers.apply(variables, x, None)[0] ** 2)
    expected = jax.jit(jax.value_and_grad(loss))(variables, x)
    mesh = mesh_of((2, 4), ("b", "n"))
    with jax.set_mesh(mesh):
        actual = jax.jit(jax.value_and_grad(loss))(variables, jax.device_put(x, NamedSharding(mesh, P("b"))))
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
