"""Keys and values in 8 bits: one float32 scale for each token and key/value head, from its largest feature.

The scales bound the error of attention to quantized keys and values. Let e_k[s] and e_v[s] bound the error of a feature
of key and value s (`rounding_error`). A score of the query then changes by at most

    delta = |scale| * sum_h |q_h| * max_s e_k[s],

because soft cap, bias, slopes and masks do not increase the change. If every score changes by at most delta, a subset
of keys with probability p = sigmoid(x) has a probability between sigmoid(x - 2 delta) and sigmoid(x + 2 delta)
afterwards, so the probability of a subset changes by at most tanh(delta / 2). An average over keys with these weights
changes by at most that times the range of the averaged numbers. Each feature v of the output changes by at most

    tanh(delta / 2) * (max_s value[s, v] - min_s value[s, v]) + max_s e_v[s],

where s runs over the keys that the query may attend to (a sink counts as a key with value 0). The rounding errors of
the computation itself are added to this, as without quantization.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

DTYPES = (jnp.int8, jnp.float8_e4m3fn)


def quantize(x: Float[ArrayLike, "*B S K H"], dtype: DTypeLike) -> tuple[Array, Float[Array, "*B S K"]]:
    """Keys or values in 8 bits, and their scales; `dequantize` is the inverse.

    A scale is max|x| / 127 (int8) or max|x| / 448 (float8_e4m3fn) over the features of one token and head, so nothing
    overflows. NaN or infinity in a token and head makes its scale, and all its dequantized features, NaN or infinite.

    Args:
      x: any float dtype.
      dtype: "int8" or "float8_e4m3fn".

    Returns:
      `[..., S, K, H]` in `dtype`, and float32 `[..., S, K]`.
    """
    x = jnp.asarray(x).astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest(dtype)
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)  # for zeros: 0 / 0 would be NaN
    scaled = x / scale[..., None]
    return (jnp.round(scaled) if jnp.dtype(dtype) == jnp.int8 else scaled).astype(dtype), scale


def dequantize(x: Array, scale: Float[Array, "*B S K"]) -> Float[Array, "*B S K H"]:
    """The numbers that quantized numbers represent, in the dtype of the scale."""
    return x.astype(scale.dtype) * scale[..., None]


def rounding_error(dtype: DTypeLike, scale: Float[Array, "*B S K"]) -> Float[Array, "*B S K"]:
    """The largest error of quantization in any feature of a token.

    int8: half a step, scale / 2. float8_e4m3fn: half the distance of the largest numbers, which are 32 apart:
    16 * scale. (Its relative error is at most 1 / 16, so small features have smaller errors.)
    """
    return scale * (0.5 if jnp.dtype(dtype) == jnp.int8 else 16.0)


def largest(dtype: DTypeLike) -> float:
    """The largest number of a dtype for keys and values."""
    check_dtype(dtype)
    return 127.0 if jnp.dtype(dtype) == jnp.int8 else float(jnp.finfo(dtype).max)


def is_quantized(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype) in DTYPES


def check_dtype(dtype: DTypeLike) -> None:
    if not is_quantized(dtype):
        names = [jnp.dtype(known).name for known in DTYPES]
        raise ValueError(f"Keys and values are quantized to one of {names}: dtype={jnp.dtype(dtype).name}.")
