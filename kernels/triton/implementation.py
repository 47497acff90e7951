"""The Pallas-Triton implementation: the calls that it does not support, and the kernel for each of the others.

The kernels are imported when a program with one is traced: this import takes a sixth of the time of importing JAX, and
with a JAX that no longer has Pallas-Triton all other implementations still work.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp

from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import gpu, row_terms
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.triton import lowering, precision, tables, tile_config
from mqa_jax.kernels.xla import implementation as plain_xla
from mqa_jax.shapes import LogSumExp, Output

MAX_HEAD = 256  # with more features the sums of a tile do not fit into registers
BIAS_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)  # smaller ones are not compiled for all GPUs


def cannot(inputs: Inputs) -> str | None:
    """The reasons why the kernels cannot compute these inputs, or None if they can."""
    reasons = list(_reasons(inputs))
    return "; ".join(reasons) + "; use implementation=None" if reasons else None


def _reasons(inputs: Inputs) -> Iterator[str]:
    size, operands, capability = inputs.sizes, inputs.operands, gpu.capability()
    if absent := _absent():
        yield absent
    if not all(isinstance(n, int) for n in (size.B, size.T, size.S)):
        yield f"known batches and lengths only, no symbols of jax.export (B={size.B}, T={size.T}, S={size.S})"
    if max(size.H, size.V) > MAX_HEAD:
        yield f"head sizes of at most {MAX_HEAD} only (H={size.H}, V={size.V})"
    if inputs.dtype == jnp.float64:
        yield f"float32, bfloat16 and float16 only ({inputs.dtype=!s})"
    if operands.bias is not None and operands.bias.dtype not in BIAS_DTYPES:
        names = ", ".join(jnp.dtype(dtype).name for dtype in BIAS_DTYPES)
        yield f"a bias of {names} only (bias.dtype={operands.bias.dtype!s})"
    bytewise = {"mask": inputs.mask.allowed, "key": operands.key, "value": operands.value}
    found = [f"{name}.shape={x.shape}" for name, x in bytewise.items() if x is not None and lowering.is_out_of_reach(x)]
    if found:
        yield f"arrays of bytes of less than 2 or more than 4 GiB only ({', '.join(found)})"
    if refusal := precision.refusal(inputs):
        yield refusal
    yield from tables.refusals(inputs)
    if capability is not None and capability < 80:
        yield f"GPUs from compute capability 8.0 on only (this one: {capability / 10})"
    if capability is not None and capability < 89 and operands.key.dtype == jnp.float8_e4m3fn:
        yield f"float8_e4m3fn from compute capability 8.9 on only (this one: {capability / 10})"


@functools.cache
def _absent() -> str | None:
    try:
        from jax.experimental.pallas.triton import CompilerParams, elementwise_inline_asm, load, store  # noqa: F401
    except ImportError as error:
        return f"a JAX with Pallas-Triton only (jax.__version__={jax.__version__!r}: {error})"
    return None


def in_reach() -> bool:
    """Whether there is an NVIDIA GPU, or one is assumed (`kernels.gpu.assuming`)."""
    return gpu.is_assumed() or gpu.capability_at_hand() is not None


def forward(inputs: Inputs, interpret: bool = False) -> tuple[Output, Normalizer]:
    from mqa_jax.kernels.triton.decode import MAX_QUERIES, decode_kernel
    from mqa_jax.kernels.triton.forward import forward_kernel

    inputs, size = _readable(inputs), inputs.sizes
    if size.T <= MAX_QUERIES:
        tiles = tile_config.choose("decode", inputs, rows=size.T * size.G)
        return decode_kernel(inputs, tiles, interpret)
    return forward_kernel(inputs, tile_config.choose("forward", inputs), interpret)


def backward(
    inputs: Inputs,
    out: Output,
    normalizer: Normalizer,
    d_out: Output,
    d_log_sum_exp: LogSumExp,
    interpret: bool = False,
) -> Operands:
    from mqa_jax.kernels.triton.backward import Saved, d_key_and_value, d_query
    from mqa_jax.kernels.triton.score_gradient import d_bias, d_slopes

    inputs, given = _readable(inputs), inputs.operands
    operands = inputs.operands
    delta = row_terms.delta(out, d_out, d_log_sum_exp)
    saved = Saved(d_out, *(x.swapaxes(1, 2) for x in (*normalizer, delta)))
    run = lambda kernel, direction: kernel(inputs, saved, tile_config.choose(direction, inputs), interpret)
    d_key, d_value = run(d_key_and_value, "dkv")
    gradients = Operands(
        query=run(d_query, "dq"),
        key=d_key,
        value=d_value,
        bias=run(d_bias, "dscore") if inputs.needs_gradient("bias") else None,
        alibi_slopes=run(d_slopes, "dscore") if inputs.needs_gradient("alibi_slopes") else None,
        sinks=row_terms.d_sinks(operands.sinks, normalizer, delta),
        score_arrays=(
            plain_xla.d_score_arrays(inputs, out, normalizer, d_out, d_log_sum_exp)
            if inputs.needs_gradient("score_arrays")
            else None
        ),
    )
    in_its_dtype = lambda gradient, x: None if gradient is None else gradient.astype(inputs.dtype_of_gradient(x))
    return jax.tree.map(in_its_dtype, gradients, given, is_leaf=lambda x: x is None)


def tangent(
    inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands, interpret: bool = False
) -> tuple[Output, LogSumExp]:
    """The tangents of output and log-sum-exp. `tangents` has None for an operand whose tangent is 0.

    With a `score_fn` plain XLA computes them: the kernel cannot differentiate the reading of its arrays.
    """
    if inputs.score_fn is not None:
        return plain_xla.tangent_on_accelerators(inputs, out, normalizer, tangents)

    from mqa_jax.kernels.triton.tangent import tangent_kernel

    inputs, tangents = _readable(inputs), _with_float32(tangents)
    return tangent_kernel(inputs, out, normalizer, tangents, tile_config.choose("tangent", inputs), interpret)


def _readable(inputs: Inputs) -> Inputs:
    return replace(inputs, operands=_with_float32(inputs.operands))


def _with_float32(operands: Operands) -> Operands:
    """Slopes and sinks, N numbers each, in float32: the kernels cannot read every dtype that these may have."""
    slopes, sinks = (None if x is None else x.astype(jnp.float32) for x in (operands.alibi_slopes, operands.sinks))
    return replace(operands, alibi_slopes=slopes, sinks=sinks)
