"""Runs in a process of its own with 8 CPU devices: forward mode and second derivatives of a sequence that is cut."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import tangents
from jax.sharding import PartitionSpec as P
from sequences import OPTIONS, WAYS, H, K, N, T, V, attention, inside_shard_map, mesh_of, normal, problem, ways_of

import mqa_jax

# -- first derivatives ------------------------------------------------------------------------------------------------


@functools.cache
def expected(name, operands=None):
    """Tangents, NaN in the padding, which nothing may read, and what the results are judged by."""
    one, *_ = problem(name)
    moved = tangents.random_tangents(one, operands)
    return one, moved, *tangents.expected(one, moved)


def agrees(name, attend, operands=None):
    one, moved, plain, right = expected(name, operands)
    oracle.judge(tangents.of_function(one, with_arguments(attend))(one, moved), plain, right)


def with_arguments(attend):
    return lambda arrays, options: attend(**oracle.arguments(arrays, options))


def check(judged, name, strategy, order, devices, *more):
    try:
        judged(name, attention(mesh_of(devices), strategy, order, devices), *more)
    except Exception as error:
        error.add_note(f"{judged.__name__}, {name}, {strategy}, {order}, {devices=}, {more}")
        raise


def some_of_everything():
    check(agrees, "everything", "ring", "zigzag", 3)
    check(agrees, "functions", "all_gather", "zigzag", 2)


def everything(part=0, parts=1):
    """Each option with one way on one number of devices; and tangents of some operands alone."""
    every: list[Any] = []
    for number, (name, devices) in enumerate(zip(OPTIONS, itertools.cycle((8, 3, 1, 3, 8)))):
        ways = ways_of(name)
        every.append((name, *ways[number % len(ways)], devices))
    some = ("query",), ("value", "alibi_slopes"), ("sinks",)
    every += [("everything", "ring", "zigzag", 3, operands) for operands in some]
    for one in every[part::parts]:
        check(agrees, *one)


# -- second derivatives -----------------------------------------------------------------------------------------------


def total(attend, arrays, options, cotangents):
    """A loss that is not linear in the results."""
    out, log_sum_exp = attend(arrays, options)
    seen = jnp.where(log_sum_exp > -jnp.inf, log_sum_exp, 0)
    return jnp.sum(jnp.sin(out) * cotangents[0]) + jnp.sum(jnp.cos(seen) * cotangents[1])


def product(one, tangent):
    """The product of two arrays of operands, without padding, where the tangent is NaN."""
    return sum(jnp.sum(jnp.where(jnp.isnan(tangent[name]), 0, tangent[name]) * x) for name, x in one.items())


# The product of the Hessian and the tangents: of the total f, in three orders of the modes.
MODES: dict[str, Any] = {
    "jvp of grad": lambda f, arrays, moved: jax.jvp(jax.grad(f), (arrays,), (moved,))[1],
    "grad of grad": lambda f, arrays, moved: jax.grad(lambda x: product(jax.grad(f)(x), moved))(arrays),
    "grad of jvp": lambda f, arrays, moved: jax.grad(lambda x: jax.jvp(f, (x,), (moved,))[1])(arrays),
}


def curvature(one, attend, mode="jvp of grad"):
    def found(arrays, moved, options):
        cotangents = [x.astype(arrays["query"].dtype) for x in one.cotangents]
        return MODES[mode](lambda x: total(attend, x, options, cotangents), arrays, moved)

    return tangents.compiled(one, found)


@functools.cache
def expected_curvature(name):
    one, moved, *_ = expected(name)
    reference = curvature(one, functools.partial(tangents.attend, "reference"))
    return curvature(one, oracle.plain_attention)(one, moved), tangents.in_float64(reference)(one, moved)


def curves_alike(name, attend, mode):
    one, moved, *_ = expected(name)
    oracle.judge(curvature(one, with_arguments(attend), mode)(one, moved), *expected_curvature(name))


def some_second():
    check(curves_alike, "everything", "ring", "zigzag", 3, "jvp of grad")


def second():
    """Each way, and each mode."""
    cycles = map(itertools.cycle, (("everything", "functions"), WAYS, (8, 3, 1), MODES))
    for name, way, devices, mode in itertools.islice(zip(*cycles), 6):
        check(curves_alike, name, *way, devices, mode)
    check(curves_alike, "window and everything", "ring", "contiguous", 8, "grad of jvp")


# -- inside of `jax.shard_map` ----------------------------------------------------------------------------------------


def in_shard_map():
    """With the check of varying axes and without."""
    for check_vma, (strategy, order), mode in zip(itertools.cycle((True, False, True)), WAYS, itertools.cycle(MODES)):
        attend = inside_shard_map(strategy, order, check_vma)
        agrees("sinks", attend)
        curves_alike("sinks", attend, mode)


def under_transformations():
    """Layers in a scan that are computed again, vmap, and no jit, where `shard_map` runs one operation at a time."""
    query, key, value = normal(2, 2, T, N, H), normal(2, 2, T, K, H), normal(2, 2, T, K, V)
    moved = jnp.cos(query)
    one_device = functools.partial(mqa_jax.dot_product_attention, is_causal=True)

    def layers(attend, query):
        layer = jax.checkpoint(lambda x, _: (x + attend(x, key, value), None))
        return jnp.sum(jnp.sin(jax.lax.scan(layer, query, None, length=2)[0]))

    def derivatives(attend):
        gradient = jax.grad(functools.partial(layers, attend))
        return jax.jit(lambda: jax.jvp(gradient, (query,), (moved,)))()

    def moves(attend):
        return jax.linearize(lambda query: attend(query, key[0], value[0]), query[0])[1](moved[0])

    mesh = mesh_of(2)
    options: Any = dict(is_causal=True, implementation="xla")
    attend = functools.partial(mqa_jax.sharded_attention, sequence_axis="s", mesh=mesh, **options)
    gathering = functools.partial(attend, strategy="all_gather")
    inside = functools.partial(mqa_jax.ring_attention, axis_name="s", **options)
    eager = jax.shard_map(inside, mesh=mesh, in_specs=P(None, "s"), out_specs=P(None, "s"))
    found = derivatives(attend), derivatives(jax.vmap(gathering)), moves(eager)
    right = *[derivatives(one_device)] * 2, moves(one_device)
    for x, y in zip(*map(jax.tree.leaves, (found, right)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


def in_bfloat16():
    """The shares of 8 devices are float32."""
    one, *_ = problem("causal")
    low = one.astype(jnp.bfloat16)
    moved = tangents.random_tangents(low)
    plain, right = tangents.expected(low, moved)
    for way in WAYS:
        attend = with_arguments(attention(mesh_of(8), *way, 8))
        oracle.judge(tangents.of_function(low, attend)(low, moved), plain, right)
