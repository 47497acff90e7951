"""Start reading here: joins the forward and the backward pass of a fused kernel into one differentiable function.

Whatever computes them, they agree on this: `forward(inputs)` returns the output and the log-sum-exp of every row
(float32, -inf in empty rows), and these two are all that is saved for `backward`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import refusals
from mqa_jax.shapes import LogSumExp, Output


@dataclass(frozen=True)
class Kernels:
    """A fused implementation: two plain functions, no derivative rules of their own."""

    forward: Callable[[Inputs], tuple[Output, LogSumExp]]
    backward: Callable[[Inputs, Output, LogSumExp, Output, LogSumExp], Operands]


def attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp]:
    """Output and log-sum-exp, both differentiable once, in reverse mode."""
    operands = jax.tree.map(refusals.reverse_mode_only, inputs.operands)
    return _attend(kernels, replace(inputs, operands=operands))


@functools.partial(jax.jit, static_argnums=0)  # a call outside jit is then compiled once, not traced anew each time
def _attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp]:
    return _differentiable(kernels, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp]:
    return kernels.forward(inputs)


def _forward(kernels: Kernels, inputs: Inputs):
    inputs = refusals.first_derivative_only(inputs)
    out, log_sum_exp = kernels.forward(inputs)
    return (out, log_sum_exp), (inputs, out, log_sum_exp)


def _backward(kernels: Kernels, saved, cotangents):
    (inputs, out, log_sum_exp), cotangents = refusals.first_derivative_only((saved, cotangents))
    gradients = kernels.backward(inputs, out, log_sum_exp, *cotangents)
    return (replace(inputs, operands=gradients, mask=None, dropout=None),)


_differentiable.defvjp(_forward, _backward)
