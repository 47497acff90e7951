"""The checker: every argument of an attention call is checked here, and nowhere else.

A message has the rule, the values and the remedy. `ValueError`: the call is wrong. A call that an implementation does
not support is a `NotImplementedError`, which that implementation raises.
"""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from mqa_jax import quantization
from mqa_jax.arguments import STATIC, array, flag, in_32_bits, integers, may_exceed_32_bits, number, shown, whole_number
from mqa_jax.dropout import Dropout
from mqa_jax.function_checks import checked_function
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.masks import MAX_INT32, MIN_INT32, Mask, Ring

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


Call = SimpleNamespace  # the arguments of `mqa_jax.dot_product_attention` by name, as the caller passed them


def checked_inputs(call: Call, parts: tuple[int, int] = (1, 1)) -> Inputs:
    """The call in normal form, except that arrays still have their leading batch axes (or as many of size 1).

    `parts`: the query, its segments and the rows of bias and mask are one of that many equal parts of all rows, and
    keys, values and their segments one of all columns. Lengths, offsets and the columns of bias and mask are whole.
    """
    query = array("query", call.query)
    key, value = (
        array(name, of_batch(x, query.shape[:-3], 3)) for name, x in (("key", call.key), ("value", call.value))
    )
    _check_shapes(query, key, value)
    scales = {"key_scale": call.key_scale, "value_scale": call.value_scale}
    _check_dtypes(query, key, value, are_scaled=any(scale is not None for scale in scales.values()))
    *batch, rows, heads, features = query.shape
    columns = key.shape[-3]
    pairs = (*batch, heads, rows, columns * parts[1])
    score_dtype = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    score_fn = checked_function("score_fn", call.score_fn, tuple(batch), score_dtype)
    score_fn, score_arrays = (None, None) if score_fn is None else score_fn.split()
    return Inputs(
        operands=Operands(
            query,
            key,
            value,
            bias=_pair_array("bias", call.bias, pairs, jnp.floating),
            alibi_slopes=_head_array("alibi_slopes", call.alibi_slopes, heads),
            sinks=_head_array("sinks", call.sinks, heads),
            **{name: _scale(name, scale, key) for name, scale in scales.items()},
            score_arrays=score_arrays,
        ),
        mask=_checked_mask(call, tuple(batch), pairs, score_dtype, parts),
        dropout=_checked_dropout(call, tuple(batch)),
        score_fn=score_fn,
        scale=_scale_of_scores(call.scale, features),
        logits_soft_cap=_checked_soft_cap(call.logits_soft_cap),
        precision=_precision(call.precision),
        residual=flag("return_residual", call.return_residual),
    )


def _precision(precision: jax.lax.PrecisionLike) -> jax.lax.PrecisionLike:
    """JAX's setting counts where the function is called; the kernels are traced when they are lowered, without it."""
    return jax.config.jax_default_matmul_precision if precision is None else precision  # type: ignore[attr-defined]


def of_batch(x: Any, batch: tuple, axes: int) -> Any:
    """One sequence `[T, N, H]` may come with other arrays that are a batch of one, `[1, S, K, H]`, as in `jax.nn`.

    `axes`: the number of axes that follow the batch axes.
    """
    if isinstance(x, list | tuple):
        return of_batch(x[0], batch, axes) if not batch and len(x) == 1 and _depth(x) == axes + 1 else x
    if batch or not hasattr(x, "shape") or len(x.shape) != axes + 1 or x.shape[0] != 1:
        return x
    return x.reshape(x.shape[1:])  # a numpy array by numpy: JAX would narrow 64 bits to 32


def _depth(x: Any) -> int:
    return 1 + _depth(x[0]) if isinstance(x, list | tuple) and x else np.ndim(x)


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    shapes = f"{query.shape=}, {key.shape=}, {value.shape=}"
    if query.ndim < 3:
        raise ValueError(f"query must be [..., T, N, H]: {shapes}. Add the axis that is missing (one head is N = 1).")
    if not query.ndim == key.ndim == value.ndim or not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(
            f"query [..., T, N, H], key [..., S, K, H] and value [..., S, K, V] must have the same leading axes: "
            f"{shapes}. Broadcast them first."
        )
    if not all(isinstance(n, int) for x in (query, key, value) for n in x.shape[-2:]):
        raise NotImplementedError(
            f"Batch axes and lengths may be symbols of jax.export, heads and features may not: {shapes}. Export one "
            "program for each number of heads and of features."
        )
    if key.shape[-3] != value.shape[-3] or key.shape[-2] != value.shape[-2]:
        raise ValueError(f"key [..., S, K, H] and value [..., S, K, V] must agree in S and K: {shapes}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have the same number of features H: {shapes}.")
    if key.shape[-2] == 0 or query.shape[-2] % key.shape[-2]:
        raise ValueError(
            f"The number of query heads must be a multiple of the number of key/value heads: "
            f"query_heads={query.shape[-2]}, kv_heads={key.shape[-2]}. "
            f"Is the layout [..., length, heads, features]? {shapes}."
        )
    if 0 in (query.shape[-1], value.shape[-1]):
        raise ValueError(f"Queries, keys and values must have at least one feature, H and V: {shapes}.")


def _check_dtypes(query: Array, key: Array, value: Array, are_scaled: bool) -> None:
    dtypes = f"{query.dtype=!s}, {key.dtype=!s}, {value.dtype=!s}"
    if query.dtype in DTYPES and key.dtype == value.dtype in quantization.DTYPES and are_scaled:
        return
    if are_scaled or key.dtype in quantization.DTYPES or value.dtype in quantization.DTYPES:
        raise ValueError(
            "Keys and values that are both int8 or both float8_e4m3fn go together with key_scale and value_scale: "
            f"{dtypes}, scales are {'' if are_scaled else 'not '}given. mqa_jax.quantize makes both."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have the same dtype: {dtypes}. Cast them with .astype().")
    if query.dtype not in DTYPES:
        raise ValueError(
            f"query, key and value must be float32, bfloat16, float16 or float64: {dtypes}. Cast them with .astype()."
        )


def _scale(name: str, scale: ArrayLike | None, key: Array) -> Array | None:
    if key.dtype not in quantization.DTYPES:
        return None
    numbers = None if scale is None else array(name, of_batch(scale, key.shape[:-3], 2))
    shape, dtype = (None, None) if numbers is None else (numbers.shape, numbers.dtype)
    if shape != key.shape[:-1] or dtype != jnp.float32:
        raise ValueError(
            f"{name} must be float32 [..., S, K], one number for each token and key/value head: {name}.shape={shape}, "
            f"{name}.dtype={dtype!s}, key.shape={key.shape}. mqa_jax.quantize makes it."
        )
    return numbers


OTHER_KINDS = {  # what the caller may have meant instead, by dtype
    "mask": {
        jnp.integer: "A mask of 0 and 1, as tokenizers make it, is mask.astype(bool), True = may attend.",
        jnp.floating: "A mask of 0 and 1 is mask.astype(bool), True = may attend; one that is added to the scores, "
        "0 and -inf, goes to bias=.",
    },
    "bias": {
        jnp.bool_: "A boolean mask goes to mask=.",
        jnp.integer: "A mask of 0 and 1 goes to mask=, as bool: .astype(bool); numbers to add are bias.astype(float).",
    },
}


def _pair_array(name: str, x: ArrayLike | None, pairs: tuple, kind: Any) -> Array | None:
    """An array that broadcasts to `[..., N, T, S]`, with missing leading axes filled in."""
    if x is None:
        return None
    x = array(name, of_batch(x, pairs[:-3], 3))
    if not jnp.issubdtype(x.dtype, kind):
        hints = [hint for other, hint in OTHER_KINDS[name].items() if jnp.issubdtype(x.dtype, other)]
        hint = "".join(hints) or f"Cast it with .astype({'bool' if kind is jnp.bool_ else 'float'})."
        raise ValueError(f"{name} must be {kind.__name__}: {name}.dtype={x.dtype!s}. {hint}")
    if x.ndim > len(pairs) or any(n not in (1, whole) for n, whole in zip(x.shape[::-1], pairs[::-1])):
        raise ValueError(
            f"{name} must broadcast to [..., N, T, S]: {name}.shape={x.shape}, [..., N, T, S]={pairs}. "
            f"Give axes that are shared size 1."
        )
    return x.reshape((1,) * (len(pairs) - x.ndim) + x.shape)


def _head_array(name: str, x: ArrayLike | None, heads: int) -> Array | None:
    if x is None:
        return None
    x = array(name, x)
    if x.shape != (heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must hold one floating point number for each query head: {name}.shape={x.shape}, "
            f"{name}.dtype={x.dtype!s}, query_heads={heads}. Make it a float [query_heads]."
        )
    return x


def _checked_mask(call: Call, batch: tuple, pairs: tuple, dtype: DTypeLike, parts: tuple) -> Mask:
    rows, columns = pairs[-2] * parts[0], pairs[-1]
    key_lengths, ring = _key_lengths(call, batch, columns)
    query_segments, key_segments = _segments(call, batch, pairs[-2], columns // parts[1])
    return Mask(
        query_offset=_query_offset(call.query_offset, batch, rows),
        allowed=_pair_array("mask", call.mask, pairs, jnp.bool_),
        query_lengths=_lengths("query_seq_lengths", call.query_seq_lengths, batch, rows),
        key_lengths=key_lengths,
        query_segments=query_segments,
        key_segments=key_segments,
        function=checked_function("mask_fn", call.mask_fn, batch, dtype),
        ring=ring,
        is_causal=flag("is_causal", call.is_causal),
        window=checked_window(call.local_window_size),
    )


def _lengths(name: str, x: ArrayLike | None, batch: tuple, longest: int) -> Array | None:
    if x is None:
        return None
    rule, remedy = "lie between 0 and the length of the array", f"length={longest}"
    return in_32_bits(name, integers(name, of_batch(x, batch, 0), batch), rule, remedy, 0, longest)


def _key_lengths(call: Call, batch: tuple, columns: int) -> tuple[Array | None, Ring | None]:
    """The number of keys that are not padding, and the ring buffer, if they are in one."""
    name, lengths = "key_value_ring_lengths", call.key_value_ring_lengths
    if lengths is None:
        return _lengths("key_value_seq_lengths", call.key_value_seq_lengths, batch, columns), None
    if call.key_value_seq_lengths is not None:
        raise ValueError(
            "key_value_ring_lengths already determines the number of keys, so key_value_seq_lengths must be None: "
            f"key_value_ring_lengths={lengths}, key_value_seq_lengths={call.key_value_seq_lengths}."
        )
    rule, remedy = "not be negative, and fit 32 bits", "which counts all tokens so far"
    lengths = in_32_bits(name, integers(name, of_batch(lengths, batch, 0), batch), rule, remedy, 0)
    return jnp.minimum(lengths, columns), Ring(lengths, columns)


def _segments(call: Call, batch: tuple, *lengths: int) -> tuple[Array | None, Array | None]:
    """int32; traced ids of a wider dtype, whose values are not known, are compared in their own dtype."""
    names = "query_segment_ids", "key_value_segment_ids"
    query, key = (of_batch(getattr(call, name), batch, 1) for name in names)
    if query is None and key is None:
        return None, None
    if query is None or key is None:
        raise ValueError(
            "query_segment_ids and key_value_segment_ids go together: "
            f"query_segment_ids is {'' if query is None else 'not '}None, "
            f"key_value_segment_ids is {'' if key is None else 'not '}None. "
            "In self-attention, pass the same array twice."
        )
    query, key = (integers(name, x, (*batch, n)) for name, x, n in zip(names, (query, key), lengths))
    if any(isinstance(x, jax.core.Tracer) and may_exceed_32_bits(x) for x in (query, key)):
        if query.dtype != key.dtype:
            raise ValueError(
                "Segment ids that may not fit 32 bits must have one dtype: "
                f"{query.dtype=!s}, {key.dtype=!s}. Cast both with .astype(jnp.int32)."
            )
        return jnp.asarray(query), jnp.asarray(key)
    rule, remedy = "fit 32 bits", "of which only equality counts: number the segments 0, 1, 2, ..."
    return in_32_bits(names[0], query, rule, remedy), in_32_bits(names[1], key, rule, remedy)


def _query_offset(x: ArrayLike, batch: tuple, rows: int) -> Array | None:
    """int32 with the batch axes, or as many axes of size 1; None for a Python 0."""
    if type(x) is int and x == 0:
        return None
    offset = integers("query_offset", of_batch(x, batch, 0), (), batch)
    highest = MAX_INT32 + 1 - max(rows, 1) if isinstance(rows, int) else MAX_INT32  # else a symbol of `jax.export`
    rule = f"leave the positions of all queries in 32 bits, from {MIN_INT32} to {highest}"
    offset = in_32_bits("query_offset", offset, rule, "where the first key is at 0", highest=highest)
    return offset.reshape(offset.shape or (1,) * len(batch))


def checked_window(size: int | tuple[int, int] | None) -> tuple[int | None, int | None] | None:
    """(left, right), where None means no limit: -1, or any number from MAX_INT32 on."""
    if size is None:
        return None
    numbers = [whole_number(n) for n in (size if isinstance(size, tuple | list) else (size, size))]
    if len(numbers) != 2 or any(n is None or n < -1 for n in numbers):
        raise ValueError(
            f"local_window_size must be an int or (left, right), not negative, {STATIC}: local_window_size={size!r}. "
            "It counts neighbours on each side; -1 is no limit there, None is no window."
        )
    left, right = (None if n == -1 or n >= MAX_INT32 else n for n in numbers)  # type: ignore[operator]
    return None if left is None and right is None else (left, right)


def _scale_of_scores(scale: float | None, features: int) -> float:
    remedy = "For a scale that is computed or learned, multiply the query by it."
    return 1 / math.sqrt(features) if scale is None else number("scale", scale, remedy)


def _checked_soft_cap(cap: float | None) -> float | None:
    if cap is None:
        return None
    cap = number("logits_soft_cap", cap, "None is no cap.")
    if cap <= 0:
        raise ValueError(f"logits_soft_cap must be positive: logits_soft_cap={cap}. None is no cap.")
    return cap


def _checked_dropout(call: Call, batch: tuple) -> Dropout | None:
    rate = number("dropout_rate", call.dropout_rate, "Each rate is a program of its own; 0 is no dropout.")
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout_rate must lie between 0 and 1: dropout_rate={rate}. 0 is no dropout.")
    if rate == 0:
        return None
    numbers = jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(batch)
    try:
        return Dropout.make(call.dropout_rng, rate, numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"dropout_rate={rate} needs a key: pass dropout_rng=jax.random.key(...), one key; "
            f"dropout_rng={shown(call.dropout_rng)}."
        ) from error
