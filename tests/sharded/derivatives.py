"""Runs in a process of its own with 8 CPU devices: forward mode and second derivatives of a sequence that is cut."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import oracle
import tangents
from sequences import DEVICES, OPTIONS, WAYS, attention, inside_shard_map, mesh_of, problem, ways_of

# -- first derivatives ------------------------------------------------------------------------------------------------


@functools.cache
def expected(name):
    """Tangents, NaN in the padding, which nothing may read, and what the results are judged by."""
    one, *_ = problem(name)
    moved = tangents.random_tangents(one)
    return one, moved, *tangents.expected(one, moved)


def agrees(name, attend):
    one, moved, plain, right = expected(name)
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
    check(agrees, "window and everything", "ring", "contiguous", 8)


def everything():
    """Each option with each way, on one number of devices each."""
    every = ((name, way) for name in OPTIONS for way in ways_of(name))
    for (name, way), devices in zip(every, itertools.cycle(DEVICES[::-1])):
        check(agrees, name, *way, devices)


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


def all_second():
    """Each way on each number of devices, in all modes."""
    names = itertools.cycle(("everything", "functions", "other lengths"))
    for way, devices, mode in itertools.product(WAYS, DEVICES, MODES):
        check(curves_alike, next(names), *way, devices, mode)
    for mode in MODES:
        check(curves_alike, "window and everything", "ring", "contiguous", 8, mode)


# -- inside of `jax.shard_map` ----------------------------------------------------------------------------------------


def in_shard_map():
    """With the check of varying axes and without."""
    for check_vma, (strategy, order), mode in zip(itertools.cycle((True, False, True)), WAYS, itertools.cycle(MODES)):
        attend = inside_shard_map(strategy, order, check_vma)
        agrees("sinks", attend)
        curves_alike("sinks", attend, mode)
