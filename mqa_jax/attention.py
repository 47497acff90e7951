"""`dot_product_attention`, and the table of implementations behind it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from mqa_jax import cudnn, reference
from mqa_jax.batch_axes import over_flat_batch
from mqa_jax.checks import checked_inputs
from mqa_jax.inputs import Inputs
from mqa_jax.kernels import flash
from mqa_jax.kernels.platforms import Kernels, by_platform
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.kernels.xla import implementation as xla


@dataclass(frozen=True)
class Implementation:
    """One implementation of attention.

    Attributes:
      compute: returns output and log-sum-exp (None if it has none) for inputs with one batch axis. Kernels may be
        selected by `implementation=None`; a plain function, which JAX differentiates, runs only if the caller names it.
      cannot: returns the reason why this implementation cannot compute a call, or None if it can.
      platform: the only platform it runs on, as in `jax.lax.platform_dependent`; None means all.
      in_reach: whether a program traced now may run on that platform; if not, `implementation=None` does not trace it.
    """

    compute: Kernels | Callable[[Inputs], tuple[Array, Array | None]]
    cannot: Callable[[Inputs], str | None] = lambda inputs: None
    platform: str | None = None
    in_reach: Callable[[], bool] = lambda: True


# In the order in which `implementation=None` tries them.
IMPLEMENTATIONS = {
    # Hand-written for NVIDIA GPUs. JAX has deprecated Pallas-Triton; Mosaic GPU kernels would go above this entry.
    "triton": Implementation(
        Kernels(triton.forward, triton.backward, triton.tangent),
        triton.cannot,
        platform="cuda",
        in_reach=triton.in_reach,
    ),
    # Runs on every platform, supports every option, uses linear memory; the platform selects its tiles at lowering.
    "xla": Implementation(Kernels(xla.forward, xla.backward, xla.tangent)),
    # The oracle. It builds [B, N, T, S].
    "reference": Implementation(jax.jit(reference.forward)),
    # NVIDIA's kernel, through jax.nn. It needs the GPU at tracing time, so it cannot be selected at lowering.
    "cudnn": Implementation(cudnn.forward, cudnn.cannot),
}


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    query_offset: ArrayLike = 0,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    key_value_ring_lengths: ArrayLike | None = None,
    key_scale: ArrayLike | None = None,
    value_scale: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: PRNGKeyArray | None = None,
    precision: jax.lax.PrecisionLike = None,
    score_fn: Callable | tuple | None = None,
    mask_fn: Callable | tuple | None = None,
) -> Any:  # an Array, or with return_residual two
    r"""Multi-head, grouped-query or multi-query attention; a drop-in for `jax.nn.dot_product_attention`.

    For every query head, with the key/value head it reads (see `mqa_jax.shapes` for the letters),

        score  = score_fn(soft_cap(scale * q . k)) + bias - alibi_slope * |query position - key position|
        output = sum over the keys it may attend to of dropout(softmax(score)) * v

    A query that may attend to no key gets output 0, and gradient 0 in query, keys, values and what is added to its
    scores. Its log-sum-exp is the sink of its head, with respect to which it is differentiable, or -inf without a sink.
    A query beyond `query_seq_lengths` is padding: output 0, log-sum-exp -inf, no gradient. `mqa_jax.masks` draws the
    pairs that each masking option leaves; they combine by AND. All options combine, with any number of leading axes.

    Args:
      query: float32, bfloat16, float16 or float64 `[..., T, N, H]`.
      key: same dtype, or int8 or float8_e4m3fn with scales, `[..., S, K, H]`; K divides N. K = N is MHA, K = 1 is MQA,
        anything between is GQA. Keys and values are never repeated for the query heads.
      value: same dtype as the key, `[..., S, K, V]`.
      bias: added to the scores; any float dtype, broadcasts to `[..., N, T, S]`. Its gradient has its own shape.
      mask: bool, broadcasts to `[..., N, T, S]`; True = may attend.
      scale: multiplies q . k. Default 1 / sqrt(H).
      is_causal: key position <= query position.
      query_seq_lengths: int `[...]`, 0 to T; queries from this index on are padding and get output 0.
      key_value_seq_lengths: int `[...]`, 0 to S; keys from this index on are padding and may hold anything, also NaN.
      local_window_size: `(left, right)` or one int for both: a query at position p attends to p - left to p + right.
        -1, and any number from 2**31 - 1 on, means no limit on that side.
      implementation: None, or a name from the table below.
      return_residual: also return the log-sum-exp of the scores.
      query_offset: position of the first query, an int or int `[...]`; keys count from 0. Positions have 32 bits.
      query_segment_ids, key_value_segment_ids: int `[..., T]` and `[..., S]`; only equal ids attend to each other.
      logits_soft_cap: c in c * tanh(score / c), applied to scale * q . k before anything is added (Gemma 2).
      alibi_slopes: float `[N]`, differentiable (Press et al. 2021, arXiv 2108.12409).
      sinks: float `[N]`, differentiable: one additional score per head in the denominator of the softmax, with value 0
        (gpt-oss). -inf means no sink in that head.
      key_value_ring_lengths: int `[...]`: keys and values are ring buffers of S slots to which that many tokens have
        been written, at most 2**31 - 1; slot s holds the newest position that is s modulo S (`mqa_jax.masks`). Replaces
        key_value_seq_lengths.
      key_scale, value_scale: float32 `[..., S, K]`, for keys and values in 8 bits (`mqa_jax.quantization`): k is
        key * key_scale, v is value * value_scale, and neither is stored. Only 'reference' has a derivative.
      dropout_rate: static; rounded to 1/65536. The dropped weights depend only on the key, batch row, head, row and
        column (`mqa_jax.dropout`), so every implementation drops the same ones.
      dropout_rng: a JAX random key, may be traced; needed when dropout_rate > 0.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      score_fn: a function, or a tuple of one and the arrays that it reads, `(function, table)`. It is called with
        `(score, batch, head, query position, key position, *arrays)` and returns the new score: elementwise, of the
        shape and dtype of the score; -inf hides a pair. `mqa_jax.functions` has examples, says what such a function may
        do, and what batch and positions are. Floating point arrays are differentiable.
      mask_fn: likewise `(batch, head, query position, key position, *arrays)` -> bool, True = may attend. Tiles in
        which it is False everywhere are not computed.

    Returns:
      The output `[..., T, N, V]` in the dtype of the query; with return_residual also the log-sum-exp, float32
      (float64 for float64) `[..., T, N]`. Both are differentiable, to any order, in forward and reverse mode.

    Raises:
      ValueError: the call is wrong; the message has the rule, the values and the remedy. Integers are checked where
        their values are known. Under a transformation, lengths and offsets are clipped to their range.
      NotImplementedError: the named implementation cannot compute this call.

    Implementations:
      None: the first of these that can compute the call and runs on the platform that the program is lowered for:
        'triton' on an NVIDIA GPU, else 'xla', which supports every call. (A machine without such a GPU traces 'triton'
        only inside `mqa_jax.kernels.gpu.assuming`, to compile for another machine.)
      'triton': FlashAttention-2 as Pallas-Triton kernels, for NVIDIA GPUs from compute capability 8.0. K/V, dK and dV
        exist at the size of the key/value heads only.
      'xla': FlashAttention-2 in plain XLA, on every platform. Memory linear in T and S; tiles that the mask hides
        entirely are not computed. Second derivatives of both are computed by the reference, in blocks of queries.
      'reference': textbook attention, memory N * T * S.
      'cudnn': `jax.nn`'s cuDNN kernel, where it supports the call.

    Example:
      >>> import jax, jax.numpy as jnp, mqa_jax
      >>> query = jnp.ones((2, 5, 8, 64))          # 8 query heads ...
      >>> key = value = jnp.ones((2, 7, 2, 64))    # ... on 2 key/value heads
      >>> mqa_jax.dot_product_attention(query, key, value, is_causal=True, query_offset=2).shape
      (2, 5, 8, 64)
    """
    call = SimpleNamespace(**locals())  # the signature is the one list of the options
    inputs = checked_inputs(call)
    out, log_sum_exp = over_flat_batch(choose(implementation, inputs), inputs)
    if not inputs.residual:
        return out
    if log_sum_exp is None:
        raise NotImplementedError(
            f"implementation={implementation!r} has no differentiable float32 log-sum-exp: "
            f"return_residual={return_residual}. Use implementation=None."
        )
    return out, log_sum_exp


def inputs_of(*arguments: Any, **options: Any) -> Inputs:
    """The checked inputs of a call of `dot_product_attention` with these arguments."""
    return inputs_of_part((1, 1), *arguments, **options)


def inputs_of_part(parts: tuple[int, int], /, *arguments: Any, **options: Any) -> Inputs:
    """The same of a device's part of a sequence; for `parts` see `checked_inputs`."""
    call = inspect.signature(dot_product_attention).bind(*arguments, **options)
    call.apply_defaults()
    return checked_inputs(SimpleNamespace(**call.arguments), parts)


def attention_with_weights(*arguments: Any, **options: Any) -> tuple[Array, Array, Array]:
    """Output, log-sum-exp and the weights `[..., N, T, S]`, float32, after dropout. Computed by the reference.

    The arguments are those of `dot_product_attention`.
    """
    return over_flat_batch(jax.jit(reference.forward_with_weights), inputs_of(*arguments, **options))


def choose(implementation: str | None, inputs: Inputs) -> Callable[[Inputs], tuple[Array, Array | None]]:
    """The function that computes these inputs."""
    compute = compute_of(implementation, inputs)
    return functools.partial(flash.attend, compute) if isinstance(compute, Kernels) else compute


def compute_of(implementation: str | None, inputs: Inputs) -> Kernels | Callable[[Inputs], tuple[Array, Array | None]]:
    """The kernels that compute these inputs, or a plain function."""
    if implementation is None:
        able = [entry for entry in IMPLEMENTATIONS.values() if entry.in_reach() and entry.cannot(inputs) is None]
        kernels = tuple((entry.platform, entry.compute) for entry in able if isinstance(entry.compute, Kernels))
        return by_platform(None, *kernels)
    if not isinstance(implementation, str) or implementation not in IMPLEMENTATIONS:
        raise ValueError(f"Unknown implementation={implementation!r}: use None or one of {sorted(IMPLEMENTATIONS)}.")
    entry = IMPLEMENTATIONS[implementation]
    reason = entry.cannot(inputs)
    if reason is not None:
        raise NotImplementedError(f"implementation={implementation!r} cannot compute this call: {reason}.")
    if not isinstance(entry.compute, Kernels):
        return entry.compute
    return by_platform(implementation, (entry.platform, entry.compute))
