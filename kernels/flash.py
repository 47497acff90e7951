"""Start reading here: one differentiable function from the passes of a fused implementation.

`platforms.Kernels` are the passes: forward, tangent (forward mode) and backward (reverse mode). `primitives` joins
them, so that JAX differentiates attention in any mode and maps it. They are called only if no size is 0.
"""

import functools

import jax
import jax.numpy as jnp

from mqa_jax import reference
from mqa_jax.inputs import Inputs
from mqa_jax.kernels import primitives
from mqa_jax.kernels.platforms import Kernels
from mqa_jax.shapes import LogSumExp, Output


def attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """Output and, with `inputs.residual`, log-sum-exp; both are differentiable."""
    if 0 in (inputs.sizes.B, inputs.sizes.T, inputs.sizes.S, inputs.sizes.N):
        return _empty(inputs)
    return _attend(kernels, inputs)


@functools.partial(jax.jit, static_argnums=0)  # so that a call outside jit is traced and compiled only once
def _attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    out, log_sum_exp = primitives.attend(kernels, inputs)
    return out, log_sum_exp if inputs.residual else None


def _empty(inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """The results without any query or any key: output 0, and the sink, or -inf without one."""
    size, sinks = inputs.sizes, reference.sinks_of_rows(inputs)
    rows = size.B, size.T, size.N
    out = jnp.zeros((*rows, size.V), inputs.dtype)
    if not inputs.residual:
        return out, None
    log_sum_exp = jnp.asarray(-jnp.inf, inputs.score_dtype) if sinks is None else sinks[..., 0].swapaxes(1, 2)
    return out, jnp.broadcast_to(log_sum_exp, rows)
