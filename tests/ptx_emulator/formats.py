"""Formats of numbers, and their roundings: what PTX calls a type, and what numpy makes of its bits."""

from typing import Any, TypeAlias

import numba
import numpy as np
from numba.extending import intrinsic

from ptx_emulator.parser import PtxError

Array: TypeAlias = Any  # np.ndarray, or a numpy scalar where an operand is a literal

# Floating-point types that numpy does not know are bits.
KINDS: dict[str, np.dtype] = {
    **{f"{letter}{8 * size}": np.dtype(f"{code}{size}") for letter, code in zip("bus", "uui") for size in (1, 2, 4, 8)},
    **dict.fromkeys(("f16", "bf16", "e4m3x2", "e5m2x2"), np.dtype("u2")),
    **dict.fromkeys(("f16x2", "bf16x2", "tf32"), np.dtype("u4")),
    "f32": np.dtype("f4"),
    "pred": np.dtype(bool),
}
HALVES = "f16", "bf16", "f16x2", "bf16x2"


def number(text: str, dtype: np.dtype) -> Any:
    """A literal as a number of this type; an integer in an untyped move may be the bits of a float."""
    if text[:2] in ("0f", "0F"):
        bits, size = int(text[2:], 16), 4
    else:
        bits, size = int(text.rstrip("U"), 0), dtype.itemsize
    if dtype == np.dtype(bool):
        return np.bool_(bits)
    if size != dtype.itemsize:
        raise PtxError(f"{text} as {dtype}")
    return np.array([bits & (1 << 8 * size) - 1], f"u{size}").view(dtype)[0]


# -- float32 ----------------------------------------------------------------------------------------------------------


@intrinsic
def _fused(typing_context, a, b, c):
    """LLVM's: one instruction where the CPU has it, else the function of the C library."""
    return a(a, b, c), lambda context, builder, signature, values: builder.fma(*values)


@numba.vectorize(["f4(f4, f4, f4)"], cache=True)
def fused_multiply_add(a, b, c):
    return _fused(a, b, c)


def fused_multiply_add_down(a: Array, b: Array, c: Array) -> Array:
    """Rounded to the number at or below: the nearest one, or the one before it."""
    nearest = fused_multiply_add(a, b, c)
    product, c = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)
    total = product + c
    lost = (product - (total - (total - product))) + (c - (total - product))  # TwoSum, Knuth: what `total` lacks
    above = (nearest.astype(np.float64) - total) - lost > 0
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def flush(x: Array) -> Array:
    """Denormal float32 numbers become 0, and keep their sign."""
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.float32(0) * x, x)


def saturate(x: Array) -> Array:
    """To [0, 1]; a NaN to 0."""
    return np.clip(np.where(np.isnan(x), np.float32(0), x), np.float32(0), np.float32(1))


# -- 16 bits ----------------------------------------------------------------------------------------------------------


def widen(kind: str, bits: Array) -> Array:
    """float32 numbers in bf16 or f16, given as bits."""
    bits = np.ascontiguousarray(bits)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def narrow(kind: str, x: Array, rounding: str = "rn") -> Array:
    """The bits of float32 (for f16 also float64) numbers in another format. A NaN in bf16 is 0x7FFF, as on a GPU."""
    if (kind, rounding) == ("f16", "rn"):
        return np.asarray(x).astype(np.float16).view(np.uint16)
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if (kind, rounding) == ("tf32", "rna"):  # to 10 bits of mantissa, ties away from 0
        return np.where(np.isfinite(x), word + np.uint32(1 << 12), word) & np.uint32(0xFFFFE000)
    if (kind, rounding) == ("bf16", "rn"):
        upper = word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
        return np.where(np.isnan(x), np.uint16(0x7FFF), upper.astype(np.uint16))
    raise PtxError(f"rounding {rounding} to {kind}")
