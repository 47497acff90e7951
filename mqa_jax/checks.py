"""The one checker: every argument of an attention call is judged here, and nowhere else.

A message says the rule, the values and the remedy. `ValueError`: the call is wrong. What an implementation cannot do is
a `NotImplementedError` and lives with the implementation.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from mqa_jax import quantization
from mqa_jax.batch_axes import without_batch_of_one
from mqa_jax.dropout import Dropout
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.masks import Mask, Ring
from mqa_jax.options import Options

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


def checked_inputs(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, bias: ArrayLike | None, mask: ArrayLike | None, options: Options
) -> Inputs:
    """The call in normal form, except that arrays still have their leading batch axes (or as many of size 1)."""
    (query, key, value, bias, mask), options = without_batch_of_one([query, key, value, bias, mask], options)
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    _check_shapes(query, key, value)
    scales = {"key_scale": options.key_scale, "value_scale": options.value_scale}
    _check_dtypes(query, key, value, are_scaled=any(scale is not None for scale in scales.values()))
    *batch, rows, heads, features = query.shape
    columns = key.shape[-3]
    pairs = (*batch, heads, rows, columns)
    return Inputs(
        operands=Operands(
            query,
            key,
            value,
            bias=_pair_array("bias", bias, pairs, jnp.floating, "a boolean mask goes to mask="),
            alibi_slopes=_head_array("alibi_slopes", options.alibi_slopes, heads),
            sinks=_head_array("sinks", options.sinks, heads),
            **{name: _scale(name, scale, key) for name, scale in scales.items()},
        ),
        mask=_checked_mask(mask, options, tuple(batch), pairs),
        dropout=_checked_dropout(options, tuple(batch)),
        scale=_number("scale", options.scale, default=1 / math.sqrt(features)),
        logits_soft_cap=_checked_soft_cap(options.logits_soft_cap),
        precision=options.precision,
    )


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    shapes = f"{query.shape=}, {key.shape=}, {value.shape=}"
    if query.ndim < 3:
        raise ValueError(f"query must be [..., T, N, H]: {shapes}. Add the axis that is missing (one head is N = 1).")
    if not query.ndim == key.ndim == value.ndim or not query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        raise ValueError(
            f"query [..., T, N, H], key [..., S, K, H] and value [..., S, K, V] must have the same leading axes: "
            f"{shapes}. Broadcast them first."
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
    shape = None if scale is None else jnp.shape(scale)
    if shape != key.shape[:-1] or jnp.asarray(scale).dtype != jnp.float32:
        raise ValueError(
            f"{name} must be float32 [..., S, K], one number for each token and key/value head: {name}.shape={shape}, "
            f"key.shape={key.shape}. mqa_jax.quantize makes it."
        )
    return jnp.asarray(scale)


def _pair_array(name: str, x: ArrayLike | None, pairs: tuple, kind: Any, hint: str) -> Array | None:
    """An array that broadcasts to `[..., N, T, S]`, with missing leading axes filled in."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, kind):
        raise ValueError(f"{name} must be {kind.__name__}: {name}.dtype={x.dtype!s}; {hint}.")
    if x.ndim > len(pairs) or any(n not in (1, whole) for n, whole in zip(x.shape[::-1], pairs[::-1])):
        raise ValueError(
            f"{name} must broadcast to [..., N, T, S]: {name}.shape={x.shape}, [..., N, T, S]={pairs}. "
            f"Give axes that are shared size 1."
        )
    return x.reshape((1,) * (len(pairs) - x.ndim) + x.shape)


def _head_array(name: str, x: ArrayLike | None, heads: int) -> Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (heads,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} must hold one floating point number for each query head: {name}.shape={x.shape}, "
            f"{name}.dtype={x.dtype!s}, query_heads={heads}."
        )
    return x


def _checked_mask(mask: ArrayLike | None, options: Options, batch: tuple, pairs: tuple) -> Mask:
    rows, columns = pairs[-2:]
    segments = options.query_segment_ids, options.key_value_segment_ids
    if (segments[0] is None) != (segments[1] is None):
        raise ValueError(
            "query_segment_ids and key_value_segment_ids go together: "
            f"query_segment_ids is {'' if segments[0] is None else 'not '}None, "
            f"key_value_segment_ids is {'' if segments[1] is None else 'not '}None. "
            "In self-attention, pass the same array twice."
        )
    key_lengths, ring = _key_lengths(options, batch, columns)
    return Mask(
        query_offset=_query_offset(options.query_offset, batch),
        allowed=_pair_array("mask", mask, pairs, jnp.bool_, "an additive mask goes to bias="),
        query_lengths=_lengths("query_seq_lengths", options.query_seq_lengths, batch, rows),
        key_lengths=key_lengths,
        query_segments=_integers("query_segment_ids", segments[0], (*batch, rows)),
        key_segments=_integers("key_value_segment_ids", segments[1], (*batch, columns)),
        ring=ring,
        is_causal=bool(options.is_causal),
        window=checked_window(options.local_window_size),
    )


def _integers(name: str, x: ArrayLike | None, shape: tuple) -> Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers: {name}.dtype={x.dtype!s}.")
    if x.shape != shape:
        raise ValueError(f"{name} has the wrong shape: {name}.shape={x.shape}, expected {shape}.")
    return x.astype(jnp.int32)


def _lengths(name: str, x: ArrayLike | None, batch: tuple, longest: int) -> Array | None:
    lengths = _integers(name, x, batch)
    if lengths is not None and not isinstance(lengths, jax.core.Tracer):
        values = np.asarray(lengths)
        if np.any((values < 0) | (values > longest)):
            raise ValueError(
                f"{name} must lie between 0 and the length of the array: {name}={values}, length={longest}."
            )
    return lengths


def _key_lengths(options: Options, batch: tuple, columns: int) -> tuple[Array | None, Ring | None]:
    """How many keys of the array are there, and whether they are in a ring."""
    ring_lengths = _integers("key_value_ring_lengths", options.key_value_ring_lengths, batch)
    if ring_lengths is None:
        return _lengths("key_value_seq_lengths", options.key_value_seq_lengths, batch, columns), None
    if options.key_value_seq_lengths is not None:
        raise ValueError(
            "key_value_ring_lengths says how many keys there are, so key_value_seq_lengths must be None: "
            f"key_value_ring_lengths={ring_lengths}, key_value_seq_lengths={options.key_value_seq_lengths}."
        )
    if not isinstance(ring_lengths, jax.core.Tracer) and np.any(np.asarray(ring_lengths) < 0):
        raise ValueError(f"key_value_ring_lengths must not be negative: key_value_ring_lengths={ring_lengths}.")
    return jnp.minimum(ring_lengths, columns), Ring(ring_lengths, columns)


def _query_offset(x: ArrayLike, batch: tuple) -> Array | None:
    """int32 with the batch axes, or as many of size 1; None for a plain 0."""
    if isinstance(x, int) and x == 0:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.shape not in ((), batch):
        raise ValueError(
            "query_offset must be an integer or one integer for each batch row: "
            f"query_offset.shape={x.shape}, query_offset.dtype={x.dtype!s}, batch axes={batch}."
        )
    return x.astype(jnp.int32).reshape(x.shape or (1,) * len(batch))


def checked_window(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    whole = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int | np.integer) for n in pair)
    if not whole or min(pair) < 0:  # type: ignore[arg-type]
        raise ValueError(
            f"local_window_size must be an int or (left, right), not negative: local_window_size={size!r}. "
            "It counts neighbours on each side; None is no window."
        )
    left, right = pair  # type: ignore[misc]
    return int(left), int(right)


def _number(name: str, x: float | None, default: float | None = None) -> float:
    """A number that is known when the call is traced."""
    if x is None and default is not None:
        return default
    try:
        number = float(x)  # type: ignore[arg-type]
    except (TypeError, jax.errors.ConcretizationTypeError) as error:
        raise ValueError(
            f"{name} must be a number known when the call is traced: {name}={x!r}. "
            "For a scale that is computed or learned, multiply the query by it."
        ) from error
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite: {name}={number}.")
    return number


def _checked_soft_cap(cap: float | None) -> float | None:
    if cap is None:
        return None
    number = _number("logits_soft_cap", cap)
    if number <= 0:
        raise ValueError(f"logits_soft_cap must be positive: logits_soft_cap={number}. None is no cap.")
    return number


def _checked_dropout(options: Options, batch: tuple) -> Dropout | None:
    rate = _number("dropout_rate", options.dropout_rate)
    if not 0 <= rate <= 1:
        raise ValueError(f"dropout_rate must lie between 0 and 1: dropout_rate={rate}.")
    if rate == 0:
        return None
    if options.dropout_rng is None:
        raise ValueError(f"dropout_rate={rate} needs a key: pass dropout_rng=jax.random.key(...).")
    numbers = jnp.arange(math.prod(batch), dtype=jnp.int32).reshape(batch)
    return Dropout.make(options.dropout_rng, rate, numbers)
