"""Tangents of output and log-sum-exp (forward mode): of an implementation, the reference, the plain computation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import option_space
import oracle

import mqa_jax
from mqa_jax.attention import inputs_of
from mqa_jax.batch_axes import over_flat_batch
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.masks import Mask

Arrays = dict[str, Any]
Found = dict[str, Any]  # the tangents of "out" and "log_sum_exp"


def random_tangents(problem: oracle.Problem, names: Any = None, seed: int = 0) -> Arrays:
    """Of these operands, by default of all; NaN in the padding, which nothing may read.

    Those of slopes are small as slopes are: they are multiplied by distances.
    """
    rng = np.random.default_rng(seed)
    arrays = {name: x for name, x in problem.arrays.items() if name in (names or problem.arrays)}
    normal = lambda x: jnp.asarray(rng.standard_normal(x.shape, dtype=np.float32)).astype(x.dtype)
    tangents = {name: normal(x) / (16 if name == "alibi_slopes" else 1) for name, x in arrays.items()}
    return {
        name: x
        for name, x in option_space.spoilt(problem.arrays | tangents, problem.options).items()
        if name in tangents
    }


# -- of the kernels ---------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moved:
    """Inputs and the tangents of their operands, which `over_flat_batch` takes as it takes inputs."""

    inputs: Inputs
    tangents: Operands

    @property
    def operands(self) -> Operands:
        return self.inputs.operands

    @property
    def mask(self) -> Mask:
        return self.inputs.mask


def moved(arrays: Arrays, tangents: Arrays, options: dict[str, Any]) -> Any:
    """The tangents with as many axes as the operands have."""
    inputs = inputs_of(**oracle.arguments(arrays, options), return_residual=True)
    filled = inputs_of(**oracle.arguments(arrays | tangents, options)).operands
    absent: dict[str, Any] = {field.name: None for field in fields(Operands) if field.name not in tangents}
    return Moved(inputs, replace(filled, **absent))


def saved(inputs: Inputs, interpret: bool) -> tuple[Any, Normalizer]:
    """Output and normalizer as a backward pass gets them."""
    out, (highest, log_total) = triton.forward(inputs, interpret=interpret)
    finite = jnp.where(highest == -jnp.inf, jnp.finfo(highest.dtype).max, highest)
    return out, Normalizer(finite, log_total)


def of_kernels(problem: oracle.Problem, interpret: bool) -> Callable[[oracle.Problem, Arrays], Found]:
    def run(both: Any) -> tuple[Any, Any]:
        return triton.tangent(both.inputs, *saved(both.inputs, interpret), both.tangents, interpret=interpret)

    return compiled(problem, lambda arrays, tangents, options: over_flat_batch(run, moved(arrays, tangents, options)))


# -- of an implementation ---------------------------------------------------------------------------------------------


def of_implementation(problem: oracle.Problem, name: str) -> Callable[[oracle.Problem, Arrays], Found]:
    """As JAX computes them from `dot_product_attention`."""
    return of_function(problem, functools.partial(attend, name))


def attend(implementation: str, arrays: Arrays, options: dict[str, Any]) -> Any:
    return mqa_jax.dot_product_attention(
        **oracle.arguments(arrays, options), implementation=implementation, return_residual=True
    )


def of_function(problem: oracle.Problem, attend: Callable[..., Any]) -> Callable[[oracle.Problem, Arrays], Found]:
    """Of a function of arrays and options."""
    return compiled(problem, _differentiated(attend))


# -- what they are judged by ------------------------------------------------------------------------------------------


def of_plain(problem: oracle.Problem) -> Callable[[oracle.Problem, Arrays], Found]:
    """In the precision of the arrays."""
    return of_function(problem, oracle.plain_attention)


def of_reference(problem: oracle.Problem) -> Callable[[oracle.Problem, Arrays], Found]:
    """In float64."""
    return in_float64(of_implementation(problem, "reference"))


def in_float64(compute: Callable[[oracle.Problem, Arrays], Found]) -> Callable[[oracle.Problem, Arrays], Found]:
    def exact(problem: oracle.Problem, tangents: Arrays) -> Found:
        with jax.enable_x64(True):
            tangents = {name: x.astype(jnp.float64) for name, x in tangents.items()}
            return jax.tree.map(np.asarray, compute(problem.astype(jnp.float64), tangents))

    return exact


def _differentiated(attend: Callable[[Arrays, dict[str, Any]], Any]) -> Callable[..., Any]:
    def tangents_of(arrays: Arrays, tangents: Arrays, options: dict[str, Any]) -> Any:
        moving = {name: arrays[name] for name in tangents}
        return jax.jvp(lambda moving: attend(arrays | moving, options), (moving,), (tangents,))[1]

    return tangents_of


def compiled(problem: oracle.Problem, tangents_of: Callable) -> Callable[[oracle.Problem, Arrays], Found]:
    """For problems that differ in the values of arrays; what is an array is an argument of the program."""
    static = {name: x for name, x in problem.options.items() if not isinstance(x, jax.Array)}

    @jax.jit
    def compute(arrays: Arrays, tangents: Arrays, options: dict[str, Any]) -> Found:
        found = tangents_of(arrays, tangents, static | options)
        return found if isinstance(found, dict) else dict(zip(("out", "log_sum_exp"), found))

    def for_values(other: oracle.Problem, tangents: Arrays) -> Found:
        options = {name: x for name, x in other.options.items() if name not in static}
        return compute(other.arrays, tangents, options)

    return for_values


def expected(problem: oracle.Problem, tangents: Arrays) -> tuple[Found, Found]:
    """What the rule of `oracle.judge` compares with."""
    return of_plain(problem)(problem, tangents), of_reference(problem)(problem, tangents)


def judge(problem: oracle.Problem, tangents: Arrays | None = None, interpret: bool = True) -> None:
    tangents = random_tangents(problem) if tangents is None else tangents
    oracle.judge(of_kernels(problem, interpret)(problem, tangents), *expected(problem, tangents))
