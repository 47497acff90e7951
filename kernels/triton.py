"""The Pallas-Triton implementation: what it cannot do, and which kernel computes what."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import (
    row_terms,
    tile_config,
    triton_backward,
    triton_decode,
    triton_forward,
    triton_lowering,
    triton_precision,
    triton_score_gradient,
)
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.triton_backward import Saved
from mqa_jax.shapes import LogSumExp, Output

LARGEST_HEAD = 256  # beyond, the sums of a tile no longer fit into registers
BIAS_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)  # smaller ones are not compiled for all GPUs


def cannot(inputs: Inputs) -> str | None:
    """Why not, or None if it can."""
    reasons = list(_reasons(inputs))
    return "; ".join(reasons) + "; use implementation=None" if reasons else None


def _reasons(inputs: Inputs) -> Iterator[str]:
    size, operands, capability = inputs.sizes, inputs.operands, tile_config.capability()
    if not all(isinstance(n, int) for n in (size.B, size.T, size.S)):
        yield f"batches and lengths that are known, no symbols of jax.export (B={size.B}, T={size.T}, S={size.S})"
    if max(size.H, size.V) > LARGEST_HEAD:
        yield f"head sizes of at most {LARGEST_HEAD} only (H={size.H}, V={size.V})"
    if inputs.dtype == jnp.float64:
        yield f"float32, bfloat16 and float16 only ({inputs.dtype=!s})"
    if operands.bias is not None and operands.bias.dtype not in BIAS_DTYPES:
        names = ", ".join(jnp.dtype(dtype).name for dtype in BIAS_DTYPES)
        yield f"a bias of {names} only (bias.dtype={operands.bias.dtype!s})"
    bytewise = {"mask": inputs.mask.allowed, "key": operands.key, "value": operands.value}
    out_of_reach = triton_lowering.is_out_of_reach
    found = [f"{name}.shape={x.shape}" for name, x in bytewise.items() if x is not None and out_of_reach(x)]
    if found:
        yield f"arrays of bytes of less than 2 or more than 4 GiB only ({', '.join(found)})"
    if precision := triton_precision.refusal(inputs):
        yield precision
    if capability is not None and capability < 80:
        yield f"GPUs from compute capability 8.0 on only (this one: {capability / 10})"
    if capability is not None and capability < 89 and operands.key.dtype == jnp.float8_e4m3fn:
        yield f"float8_e4m3fn from compute capability 8.9 on only (this one: {capability / 10})"


def in_reach() -> bool:
    """Whether there is an NVIDIA GPU, or one is compiled for."""
    return tile_config.is_assumed() or tile_config.capability_at_hand() is not None


def forward(inputs: Inputs, interpret: bool = False) -> tuple[Output, Normalizer]:
    inputs, size = _readable(inputs), inputs.sizes
    if size.T <= triton_decode.MOST_QUERIES:
        tiles = tile_config.choose("decode", inputs, rows=size.T * size.G)
        return triton_decode.forward(inputs, tiles, interpret)
    return triton_forward.forward(inputs, tile_config.choose("forward", inputs), interpret)


def backward(
    inputs: Inputs,
    out: Output,
    normalizer: Normalizer,
    d_out: Output,
    d_log_sum_exp: LogSumExp,
    interpret: bool = False,
) -> Operands:
    inputs, given = _readable(inputs), inputs.operands
    operands = inputs.operands
    delta = row_terms.delta(out, d_out, d_log_sum_exp)
    saved = Saved(d_out, *(x.swapaxes(1, 2) for x in (*normalizer, delta)))
    run = lambda kernel, direction: kernel(inputs, saved, tile_config.choose(direction, inputs), interpret)
    d_key, d_value = run(triton_backward.d_key_and_value, "dkv")
    gradients = Operands(
        query=run(triton_backward.d_query, "dq"),
        key=d_key,
        value=d_value,
        bias=run(triton_score_gradient.d_bias, "dscore") if inputs.needs_gradient("bias") else None,
        alibi_slopes=run(triton_score_gradient.d_slopes, "dscore") if inputs.needs_gradient("alibi_slopes") else None,
        sinks=row_terms.d_sinks(operands.sinks, normalizer, delta),
    )
    in_its_dtype = lambda gradient, x: None if gradient is None else gradient.astype(x.dtype)
    return jax.tree.map(in_its_dtype, gradients, given, is_leaf=lambda x: x is None)


def _readable(inputs: Inputs) -> Inputs:
    """Slopes and sinks, N numbers each, in float32: kernels do not read all dtypes that these may have."""
    operands = inputs.operands
    slopes, sinks = (None if x is None else x.astype(jnp.float32) for x in (operands.alibi_slopes, operands.sinks))
    return replace(inputs, operands=replace(operands, alibi_slopes=slopes, sinks=sinks))
