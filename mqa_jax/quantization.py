"""Keys and values in 8 bits: one float32 scale for each token and key/value head, taken from its largest feature.

How far attention to quantized keys and values is from attention to the numbers they were made of follows from the
scales. Let e_k[s] and e_v[s] bound the error of a feature of key and value s (`rounding_error`). The score of a query
then moves by at most

    delta = |scale| * sum_h |q_h| * max_s e_k[s],

as soft cap, bias, slopes and masks move it no further. If every score moves by at most delta, a subset of keys with
probability p = sigmoid(x) has one between sigmoid(x - 2 delta) and sigmoid(x + 2 delta) afterwards, so no subset gains
or loses more than tanh(delta / 2); and an average over keys whose weights move like that moves by no more than that
times the distance between the largest and the smallest number averaged. Each feature v of the output moves by at most

    tanh(delta / 2) * (max_s value[s, v] - min_s value[s, v]) + max_s e_v[s],

where s runs over the keys that the query may attend to (a sink counts as one with value 0). Rounding in the computation
itself comes on top, as it does without quantization.
"""

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

DTYPES = (jnp.int8, jnp.float8_e4m3fn)


def quantize(x: Float[ArrayLike, "*B S K H"], dtype: DTypeLike) -> tuple[Array, Float[Array, "*B S K"]]:
    """Keys or values in 8 bits, and their scales; see `dequantize` for the way back.

    A scale is max|x| / 127 (int8) or max|x| / 448 (float8_e4m3fn) over the features of one token and head, so nothing
    overflows. NaN and infinity make the scale NaN or infinite, and with it everything that is read with it.

    Args:
      x: any float dtype.
      dtype: "int8" or "float8_e4m3fn".

    Returns:
      `[..., S, K, H]` in `dtype`, and float32 `[..., S, K]`.
    """
    x = jnp.asarray(x).astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest(dtype)
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)  # of zeros: dividing by it must not give NaN
    scaled = x / scale[..., None]
    return (jnp.round(scaled) if jnp.dtype(dtype) == jnp.int8 else scaled).astype(dtype), scale


def dequantize(x: Array, scale: Float[Array, "*B S K"]) -> Float[Array, "*B S K H"]:
    """What quantized numbers stand for, in the dtype of the scale."""
    return x.astype(scale.dtype) * scale[..., None]


def rounding_error(dtype: DTypeLike, scale: Float[Array, "*B S K"]) -> Float[Array, "*B S K"]:
    """By how much quantizing moves any feature of a token at most.

    int8: half a step, scale / 2. float8_e4m3fn: half a step between the largest numbers, 32 apart, 16 * scale. (Small
    features are better off there: a feature moves by no more than a sixteenth of itself.)
    """
    return scale * (0.5 if jnp.dtype(dtype) == jnp.int8 else 16.0)


def largest(dtype: DTypeLike) -> float:
    """The largest number of a dtype in which keys and values can be stored."""
    check_dtype(dtype)
    return 127.0 if jnp.dtype(dtype) == jnp.int8 else float(jnp.finfo(dtype).max)


def is_quantized(dtype: DTypeLike) -> bool:
    return jnp.dtype(dtype) in DTYPES


def check_dtype(dtype: DTypeLike) -> None:
    if not is_quantized(dtype):
        names = [jnp.dtype(known).name for known in DTYPES]
        raise ValueError(f"Keys and values are quantized to one of {names}: dtype={jnp.dtype(dtype).name}.")
