"""A fused implementation: three plain functions without derivative rules, and their selection for each platform.

`forward(inputs)` returns the output and, for every row, the denominator of its softmax as two numbers
(`online_softmax.Normalizer`, `[B, T, N]`; in rows that attend to no key, the sink, or -inf without one). Only these are
saved for the other two, which get the largest finite number instead of -inf.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import row_blocks
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.shapes import LogSumExp, Output


def tangent_in_row_blocks(
    inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands
) -> tuple[Output, LogSumExp]:
    """For an implementation that has no forward mode of its own."""
    operands = inputs.operands
    moved = jax.tree.map(lambda x, dx: jnp.zeros_like(x) if dx is None else dx, operands, tangents)
    attend = lambda operands: row_blocks.attend(replace(inputs, operands=operands))
    return jax.jvp(attend, (operands,), (moved,))[1]


@dataclass(frozen=True)
class Kernels:
    """The passes. `tangents` has None for an operand whose tangent is zero.

    `textbook` computes the same in operations that JAX differentiates, for second derivatives.
    """

    forward: Callable[[Inputs], tuple[Output, Normalizer]]
    backward: Callable[[Inputs, Output, Normalizer, Output, LogSumExp], Operands]
    tangent: Callable[[Inputs, Output, Normalizer, Operands], tuple[Output, LogSumExp]] = tangent_in_row_blocks
    textbook: Callable[[Inputs], tuple[Output, LogSumExp]] = row_blocks.attend


@functools.cache  # the same object for the same choices, so that jit finds the programs compiled for it
def by_platform(name: str | None, *choices: tuple[str | None, Kernels]) -> Kernels:
    """Kernels that are selected at lowering: the first for the platform ("cuda"), else the first for all (None).

    Where there is neither, lowering raises NotImplementedError for implementation `name`.
    """
    return Kernels(**{which: _by_platform(name, choices, which) for which in ("forward", "backward", "tangent")})


def _by_platform(name: str | None, choices: tuple[tuple[str | None, Kernels], ...], which: str) -> Callable:
    passes: dict[str, Callable] = {}
    for platform, kernels in choices:
        passes.setdefault(platform or "default", getattr(kernels, which))
    if list(passes) == ["default"]:
        return passes["default"]
    message = (
        f"implementation={name!r} runs only on {', '.join(sorted(passes))}, and this program is lowered for another "
        "platform. Use implementation=None, which selects an implementation for each platform."
    )

    def unsupported(*arguments):  # results of the right shapes, whose lowering raises
        shapes = jax.eval_shape(next(iter(passes.values())), *arguments)
        return jax.tree.map(lambda x: _refused_p.bind(jnp.zeros(x.shape, x.dtype), message=message), shapes)

    return lambda *arguments: lax.platform_dependent(*arguments, **{"default": unsupported, **passes})


def _refuse(*_: Any, message: str, **__: Any) -> Any:
    raise NotImplementedError(message)


_refused_p = Primitive("refused")  # the identity; running or lowering it raises
_refused_p.def_impl(_refuse)
_refused_p.def_abstract_eval(lambda aval, **_: aval)
mlir.register_lowering(_refused_p, _refuse)
batching.defvectorized(_refused_p)
