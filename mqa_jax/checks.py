"""The checker: every argument of an attention call is checked here (masks in `mask_checks`), and nowhere else.

A message has the rule, the values and the remedy. `ValueError`: the call is wrong. A call that an implementation does
not support is a `NotImplementedError`, which that implementation raises.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from mqa_jax import quantization
from mqa_jax.arguments import array, flag, number, of_batch, shown
from mqa_jax.dropout import Dropout
from mqa_jax.function_checks import checked_function
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.mask_checks import Call, checked_mask, pair_array

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


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
            bias=pair_array("bias", call.bias, pairs, jnp.floating),
            alibi_slopes=_head_array("alibi_slopes", call.alibi_slopes, heads),
            sinks=_head_array("sinks", call.sinks, heads),
            **{name: _scale(name, scale, key) for name, scale in scales.items()},
            score_arrays=score_arrays,
        ),
        mask=checked_mask(call, tuple(batch), pairs, score_dtype, parts),
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
