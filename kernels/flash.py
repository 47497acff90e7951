"""Start reading here: joins the forward and the backward pass of a fused kernel into one differentiable function.

Whatever computes them, they agree on this: `forward(inputs)` returns the output and, for every row, what its softmax
divides by, as two numbers (`online_softmax.Normalizer`, `[B, T, N]`; in rows that see no key that of the sink, and
without one -inf). These are all that is saved for `backward`, which gets the largest finite number instead of -inf:
exp(score - highest) is 0 there as well, and no -inf leaves a compiled program that the caller did not ask for
(`jax_debug_infs`). No size is 0 where they are called.
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

# What the backward pass needs, under names for the policies of `jax.checkpoint` (save_only_these_names).
OUT_NAME, LOG_SUM_EXP_NAME = "mqa_jax_out", "mqa_jax_log_sum_exp"


@dataclass(frozen=True)
class Kernels:
    """A fused implementation: two plain functions, no derivative rules of their own."""

    forward: Callable[[Inputs], tuple[Output, Normalizer]]
    backward: Callable[[Inputs, Output, Normalizer, Output, LogSumExp], Operands]


def attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """Output and, if it is wanted, log-sum-exp, both differentiable once, in reverse mode."""
    if 0 in (inputs.sizes.B, inputs.sizes.T, inputs.sizes.S, inputs.sizes.N):
        return _empty(inputs)
    operands = jax.tree.map(refusals.reverse_mode_only, inputs.operands)
    return _attend(kernels, replace(inputs, operands=operands))


@functools.cache  # the same object for the same choices, so that programs compiled for it are found again
def by_platform(name: str | None, *choices: tuple[str | None, Kernels]) -> Kernels:
    """Kernels that are chosen when a program is lowered: the first for its platform ("cuda"), or for all (None).

    Where there are none, lowering raises; `name` says of what.
    """
    return Kernels(_by_platform(name, choices, "forward"), _by_platform(name, choices, "backward"))


def _by_platform(name: str | None, choices: tuple[tuple[str | None, Kernels], ...], which: str) -> Callable:
    ways: dict[str, Callable] = {}
    for platform, kernels in choices:
        ways.setdefault(platform or "default", getattr(kernels, which))
    if list(ways) == ["default"]:
        return ways["default"]
    message = (
        f"implementation={name!r} runs on {', '.join(sorted(ways))} alone, and this program is lowered for another "
        "platform. Use implementation=None, which takes it where it can."
    )

    def elsewhere(*arguments):
        shapes = jax.eval_shape(next(iter(ways.values())), *arguments)
        return jax.tree.map(lambda x: refusals.where_lowered(jnp.zeros(x.shape, x.dtype), message), shapes)

    return lambda *arguments: lax.platform_dependent(*arguments, **{"default": elsewhere, **ways})


@functools.partial(jax.jit, static_argnums=0)  # a call outside jit is then compiled once, not traced anew each time
def _attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    out, log_sum_exp = _differentiable(kernels, inputs)
    return out, log_sum_exp if inputs.residual else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp]:
    out, normalizer = kernels.forward(inputs)
    return out, normalizer.log_sum_exp


def _forward(kernels: Kernels, inputs: Inputs):
    # JAX traces this anew for other operands with gradients, but takes the structure of what is saved from one of these
    # traces for all: what is static in it may not depend on them. Shapes may: 1 for an operand with a gradient, or 0.
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
    constant = tuple(name for name, x in vars(perturbed).items() if x is not None and x.size == 0)
    inputs = replace(inputs, constant=constant)
    gradients = kernels.backward(inputs, out, normalizer, *cotangents)
    return (replace(inputs, operands=gradients, mask=None, dropout=None, constant=()),)


_differentiable.defvjp(_forward, _backward, symbolic_zeros=True)  # they tell which operands are differentiated


def _empty(inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """No query, or no key: at most a sink is seen."""
    size, sinks = inputs.sizes, reference.sinks_of_rows(inputs)
    rows = size.B, size.T, size.N
    out = jnp.zeros((*rows, size.V), inputs.dtype)
    if not inputs.residual:
        return out, None
    seen = jnp.asarray(-jnp.inf, inputs.score_dtype) if sinks is None else sinks[..., 0].swapaxes(1, 2)
    return out, jnp.broadcast_to(seen, rows)
