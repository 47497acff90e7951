"""Start reading here: joins the forward and the backward pass of a fused kernel into one differentiable function.

The contract of every fused implementation: `forward(inputs)` returns the output and, for every row, the denominator of
its softmax as two numbers (`online_softmax.Normalizer`, `[B, T, N]`; in rows that attend to no key, the sink, or -inf
without one). Only these are saved for `backward`, which gets the largest finite number instead of -inf: then
exp(score - highest) is 0 as well, and no compiled program returns an -inf that is not in the caller's results
(`jax_debug_infs`). Both are called only if no size is 0.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero, custom_vjp_primal_tree_values

from mqa_jax import reference
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import refusals
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.shapes import LogSumExp, Output

# Names of the residuals for the policies of `jax.checkpoint` (save_only_these_names).
OUT_NAME, LOG_SUM_EXP_NAME = "mqa_jax_out", "mqa_jax_log_sum_exp"


@dataclass(frozen=True)
class Kernels:
    """A fused implementation: two plain functions without derivative rules."""

    forward: Callable[[Inputs], tuple[Output, Normalizer]]
    backward: Callable[[Inputs, Output, Normalizer, Output, LogSumExp], Operands]


def attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """Output and, with `inputs.residual`, log-sum-exp; both are differentiable once, in reverse mode."""
    if 0 in (inputs.sizes.B, inputs.sizes.T, inputs.sizes.S, inputs.sizes.N):
        return _empty(inputs)
    operands = jax.tree.map(refusals.reverse_mode_only, inputs.operands)
    return _attend(kernels, replace(inputs, operands=operands))


@functools.cache  # the same object for the same choices, so that jit finds the programs compiled for it
def by_platform(name: str | None, *choices: tuple[str | None, Kernels]) -> Kernels:
    """Kernels that are selected at lowering: the first for the platform ("cuda"), else the first for all (None).

    Where there is neither, lowering raises NotImplementedError for implementation `name`.
    """
    return Kernels(_by_platform(name, choices, "forward"), _by_platform(name, choices, "backward"))


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
        return jax.tree.map(lambda x: refusals.where_lowered(jnp.zeros(x.shape, x.dtype), message), shapes)

    return lambda *arguments: lax.platform_dependent(*arguments, **{"default": unsupported, **passes})


@functools.partial(jax.jit, static_argnums=0)  # so that a call outside jit is traced and compiled only once
def _attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    out, log_sum_exp = _differentiable(kernels, inputs)
    return out, log_sum_exp if inputs.residual else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp]:
    out, normalizer = kernels.forward(inputs)
    return out, normalizer.log_sum_exp


def _forward(kernels: Kernels, inputs: Inputs):
    # JAX traces this once for each set of operands with gradients, but uses the tree structure of the residuals of one
    # trace for all: static fields may not depend on that set. Shapes may: 1 for an operand with a gradient, or 0.
    perturbed = jax.tree.map(lambda x: jnp.zeros(int(x.perturbed), bool), inputs.operands)
    inputs = custom_vjp_primal_tree_values(inputs)
    if inputs.operands.key_scale is not None:
        raise NotImplementedError(refusals.QUANTIZED)
    inputs = refusals.first_derivative_only(inputs)
    out, normalizer = kernels.forward(inputs)
    highest = jnp.where(normalizer.highest == -jnp.inf, jnp.finfo(normalizer.highest.dtype).max, normalizer.highest)
    saved = checkpoint_name(out, OUT_NAME), checkpoint_name(normalizer._replace(highest=highest), LOG_SUM_EXP_NAME)
    return (saved[0], normalizer.log_sum_exp), (inputs, perturbed, *saved)


def _backward(kernels: Kernels, saved, cotangents):
    likes = saved[2], saved[3].highest
    cotangents = [jnp.zeros_like(y) if isinstance(x, SymbolicZero) else x for x, y in zip(cotangents, likes)]
    (inputs, perturbed, out, normalizer), cotangents = refusals.first_derivative_only((saved, cotangents))
    is_constant = lambda x: x is not None and not any(y.size for y in jax.tree.leaves(x))
    constant = tuple(name for name, x in vars(perturbed).items() if is_constant(x))
    inputs = replace(inputs, constant=constant)
    gradients = kernels.backward(inputs, out, normalizer, *cotangents)
    return (replace(inputs, operands=gradients, mask=None, dropout=None, score_fn=None, constant=()),)


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)  # they show which operands are differentiated


def _empty(inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """The results without any query or any key: output 0, and the sink, or -inf without one."""
    size, sinks = inputs.sizes, reference.sinks_of_rows(inputs)
    rows = size.B, size.T, size.N
    out = jnp.zeros((*rows, size.V), inputs.dtype)
    if not inputs.residual:
        return out, None
    log_sum_exp = jnp.asarray(-jnp.inf, inputs.score_dtype) if sinks is None else sinks[..., 0].swapaxes(1, 2)
    return out, jnp.broadcast_to(log_sum_exp, rows)
