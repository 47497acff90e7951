"""The Pallas-Triton implementation: what it cannot do, and which kernel computes what."""

import jax.numpy as jnp
from jaxtyping import Array

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import (
    row_terms,
    tile_config,
    triton_backward,
    triton_call,
    triton_decode,
    triton_forward,
    triton_score_gradient,
)
from mqa_jax.kernels.triton_backward import Saved
from mqa_jax.shapes import LogSumExp, Output

LARGEST_HEAD = 256  # beyond, the sums of a tile no longer fit into registers
WRONG_OFFSETS = 2 << 30, 4 << 30  # bytes; JAX computes offsets into 1-byte arrays of such a size with a wrong sign


def cannot(inputs: Inputs) -> str | None:
    """Why not, or None if it can."""
    size = inputs.sizes
    capability = tile_config.capability()
    bytewise = {"mask": inputs.mask.allowed, "key": inputs.operands.key, "value": inputs.operands.value}
    unreachable = [f"{name}.shape={x.shape}" for name, x in bytewise.items() if x is not None and _is_out_of_reach(x)]
    reasons = {
        f"head sizes of at most {LARGEST_HEAD} only (H={size.H}, V={size.V})": max(size.H, size.V) > LARGEST_HEAD,
        f"arrays of bytes of less than 2 or more than 4 GiB only ({', '.join(unreachable)})": bool(unreachable),
        f"products of float32, or of tf32 where the precision says so ({inputs.precision=})": (
            triton_call.precision_of(inputs) is None
        ),
        f"float32, bfloat16 and float16 only ({inputs.dtype=!s})": inputs.dtype == jnp.float64,
        f"GPUs from compute capability 8.0 on only (this one: {(capability or 0) / 10})": (capability or 80) < 80,
        f"float8_e4m3fn from compute capability 8.9 on only (this one: {(capability or 0) / 10})": (
            inputs.operands.key.dtype == jnp.float8_e4m3fn and (capability or 89) < 89
        ),
    }
    found = [reason for reason, applies in reasons.items() if applies]
    return "; ".join(found) + "; use implementation=None" if found else None


def _is_out_of_reach(x: Array) -> bool:
    return x.dtype.itemsize == 1 and WRONG_OFFSETS[0] <= x.size <= WRONG_OFFSETS[1]


def in_reach() -> bool:
    """Whether there is an NVIDIA GPU, or one is compiled for."""
    return tile_config.is_assumed() or tile_config.capability_at_hand() is not None


def forward(inputs: Inputs, interpret: bool = False) -> tuple[Output, LogSumExp]:
    size = inputs.sizes
    if size.T <= triton_decode.MOST_QUERIES:
        tiles = tile_config.choose("decode", inputs, rows=size.T * size.G)
        return triton_decode.forward(inputs, tiles, interpret)
    return triton_forward.forward(inputs, tile_config.choose("forward", inputs), interpret)


def backward(
    inputs: Inputs,
    out: Output,
    log_sum_exp: LogSumExp,
    d_out: Output,
    d_log_sum_exp: LogSumExp,
    interpret: bool = False,
) -> Operands:
    delta = row_terms.delta(out, d_out, d_log_sum_exp)
    saved = Saved(d_out, log_sum_exp.swapaxes(1, 2), delta.swapaxes(1, 2))
    run = lambda kernel, direction: kernel(inputs, saved, tile_config.choose(direction, inputs), interpret)
    d_key, d_value = run(triton_backward.d_key_and_value, "dkv")
    return Operands(
        query=run(triton_backward.d_query, "dq"),
        key=d_key,
        value=d_value,
        bias=run(triton_score_gradient.d_bias, "dscore") if inputs.needs_gradient("bias") else None,
        alibi_slopes=run(triton_score_gradient.d_slopes, "dscore") if inputs.needs_gradient("alibi_slopes") else None,
        sinks=row_terms.d_sinks(inputs.operands.sinks, log_sum_exp, delta),
    )
