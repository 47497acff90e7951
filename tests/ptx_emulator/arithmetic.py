"""What one thread computes by itself: `operation` gives an instruction's meaning as a function of numpy arrays.

Integers are exact to the bit. Float arithmetic is rounded once, as told, denormals and `.ftz` included. Functions that
a GPU only approximates (ex2, rcp, div.full, tanh, ...) are nearly exact here: a GPU is off by a unit or two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numba
import numpy as np
from numba.extending import intrinsic

from ptx_emulator.parser import Instruction, PtxError

Array: TypeAlias = Any  # np.ndarray, or a numpy scalar where an operand is a literal

# What numpy calls the types of PTX. Floating-point types that it does not know are bits.
KINDS: dict[str, np.dtype] = {
    **{f"{letter}{8 * size}": np.dtype(f"{code}{size}") for letter, code in zip("bus", "uui") for size in (1, 2, 4, 8)},
    "f16": np.dtype("u2"), "bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"),
    "tf32": np.dtype("u4"), "e4m3x2": np.dtype("u2"), "e5m2x2": np.dtype("u2"),
    "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool),
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """`function` of arrays of the kinds `sources` gives one of the kind `result`."""

    function: Callable[..., Array]
    result: str
    sources: tuple[str, ...]


def operation(instruction: Instruction) -> Operation | None:
    """None: not an instruction of this kind. Raises `PtxError` for forms that are not modelled."""
    make = _MAKERS.get(instruction.words[0])
    return None if make is None else make(instruction, instruction.words[-1])


def _same(function: Callable[..., Array], kind: str, count: int, result: str | None = None) -> Operation:
    return Operation(function, result or kind, (kind,) * count)


# -- rounding ---------------------------------------------------------------------------------------------------------


@intrinsic
def _fused(typing_context, a, b, c):
    """LLVM's: one instruction where the CPU has it, else the function of the C library."""
    return a(a, b, c), lambda context, builder, signature, values: builder.fma(*values)


@numba.vectorize(["f4(f4, f4, f4)"], cache=True)
def fused_multiply_add(a, b, c):
    return _fused(a, b, c)


def flush(x: Array) -> Array:
    """Denormal float32 numbers become 0, and keep their sign."""
    return np.where(np.abs(x) < np.float32(2**-126), np.copysign(np.float32(0), x), x)


def saturate(x: Array) -> Array:
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)))


def _directed(nearest: Array, a: Array, b: Array, direction: str) -> Array:
    """The float32 on one side of the exact sum of two float64 numbers, given the nearest one."""
    total = a + b
    rest = (a - (total - (total - a))) + (b - (total - a))  # TwoSum: what `total` lacks
    off: Array = (nearest.astype(np.float64) - total) - rest  # > 0: the nearest is above
    infinity = np.float32(np.inf)
    inward = np.where(total < 0, infinity, -infinity)
    toward: Array = {"rm": -infinity, "rp": infinity, "rz": inward}[direction]
    wrong = np.where(toward < 0, off > 0, off < 0)
    return np.where(wrong, np.nextafter(nearest, toward), nearest)


def _float32(instruction: Instruction, exact: Callable[..., Array], count: int) -> Operation:
    """`exact` rounds to nearest. Modifiers change what goes in, and what comes out."""
    direction = instruction.one_of("rm", "rp", "rz")
    ftz, sat = instruction.has("ftz"), instruction.has("sat")
    root = instruction.words[0]
    if not (direction or ftz or sat):
        return _same(exact, "f32", count)
    if direction and root not in ("add", "sub", "mul", "fma"):
        raise PtxError(f"rounding {direction}")

    def function(*sources: Array) -> Array:
        sources = tuple(flush(x) for x in sources) if ftz else sources
        result = exact(*sources)
        if direction:
            wide = [np.asarray(x, np.float64) for x in sources]
            terms = {
                "add": lambda: (wide[0], wide[1]),
                "sub": lambda: (wide[0], -wide[1]),
                "mul": lambda: (wide[0] * wide[1], np.float64(0)),
                "fma": lambda: (wide[0] * wide[1], wide[2]),
            }[root]()
            result = _directed(np.asarray(result), *terms, direction)
        result = flush(result) if ftz else result
        return saturate(result) if sat else result

    return _same(function, "f32", count)


# -- 16 bits ----------------------------------------------------------------------------------------------------------


def widen(kind: str, bits: Array) -> Array:
    """float32 numbers in bf16 or f16, given as bits; what f32 and tf32 hold."""
    bits = np.ascontiguousarray(bits)
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def narrow(kind: str, x: Array, rounding: str = "rn") -> Array:
    """The bits of float32 (for f16 also float64) numbers in another format. A NaN in bf16 is 0x7FFF, as on a GPU."""
    if kind == "f16" and rounding == "rn":
        return np.asarray(x).astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    if kind == "tf32" and rounding == "rna":  # to 10 bits of mantissa, ties away from 0
        return np.where(np.isfinite(x), bits + np.uint32(1 << 12), bits) & np.uint32(0xFFFFE000)
    if kind == "bf16" and rounding in ("rn", "rz"):
        if rounding == "rn":
            bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))
    raise PtxError(f"rounding {rounding} to {kind}")


def _halves(instruction: Instruction, kind: str, function: Callable[..., Array], count: int) -> Operation:
    """On one or two 16-bit numbers, through a precision that makes the one rounding at the end the only one."""
    if instruction.has("sat", "ftz"):
        raise PtxError("saturation and flushing of 16-bit numbers")
    half = kind.removesuffix("x2")

    def compute(*sources: Array) -> Array:
        parts = [np.ascontiguousarray(x).view(np.uint16) for x in np.broadcast_arrays(*sources)]
        return narrow(half, function(*(widen(half, x) for x in parts))).view(KINDS[kind])

    return _same(compute, kind, count)


HALVES = "f16", "bf16", "f16x2", "bf16x2"

# -- arithmetic -------------------------------------------------------------------------------------------------------

_BINARY: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_EXTREMES = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}  # the second ignores a NaN


def _binary(instruction: Instruction, kind: str) -> Operation:
    root = instruction.words[0]
    if instruction.has("cc") or (instruction.has("sat") and kind[0] in "us"):
        raise PtxError("carries and saturation of integers")
    if root in _EXTREMES:
        function: Callable[..., Array] = _EXTREMES[root][not (kind[0] in "us" or instruction.has("NaN"))]
    elif kind[0] in "us" and instruction.has("wide", "hi"):
        return _wide_product(kind, instruction.has("hi"))
    else:
        function = _BINARY[root]
    if kind in HALVES:
        return _halves(instruction, kind, function, 2)
    return _float32(instruction, function, 2) if kind == "f32" else _same(function, kind, 2)


def _doubled(kind: str) -> str:
    if kind[1:] == "64":
        raise PtxError("128-bit products")
    return f"{kind[0]}{2 * int(kind[1:])}"


def _wide_product(kind: str, high: bool) -> Operation:
    wide = KINDS[_doubled(kind)]
    product = lambda a, b: np.multiply(a, b, dtype=wide)
    if not high:
        return _same(product, kind, 2, _doubled(kind))
    return _same(lambda a, b: (product(a, b) >> wide.type(8 * KINDS[kind].itemsize)).astype(KINDS[kind]), kind, 2)


def _multiply_add(instruction: Instruction, kind: str) -> Operation:
    if kind == "f32":
        return _float32(instruction, fused_multiply_add, 3)
    if kind in HALVES:
        return _halves(instruction, kind, lambda a, b, c: a.astype(np.float64) * b + c, 3)
    if instruction.has("wide"):
        wide = KINDS[_doubled(kind)]
        return Operation(
            lambda a, b, c: np.multiply(a, b, dtype=wide) + c, _doubled(kind), (kind, kind, _doubled(kind))
        )
    if not instruction.has("lo"):
        raise PtxError("high halves of products, added")
    return _same(lambda a, b, c: a * b + c, kind, 3)


def _divide(instruction: Instruction, kind: str) -> Operation:
    if kind == "f32":
        return _float32(instruction, np.divide, 2)

    def divided(a: Array, b: Array) -> tuple[Array, Array]:
        b = np.where(b == 0, KINDS[kind].type(1), b)  # the result is unspecified on a GPU
        rest = np.fmod(a, b)  # with the sign of a, as in C
        return (a - rest) // b, rest

    return _same(lambda a, b: divided(a, b)[instruction.words[0] == "rem"], kind, 2)


def _sign(instruction: Instruction, kind: str) -> Operation:
    root = instruction.words[0]
    if root == "copysign":
        return _same(lambda sign, size: np.copysign(size, sign), kind, 2)
    if kind in HALVES:
        bit = KINDS[kind].type(0x80008000 if kind.endswith("x2") else 0x8000)
        return _same((lambda x: x ^ bit) if root == "neg" else (lambda x: x & ~bit), kind, 1)
    function = np.negative if root == "neg" else np.abs
    return _float32(instruction, function, 1) if kind == "f32" else _same(function, kind, 1)


_APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x),
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos,
}  # fmt: skip


def _approximate(instruction: Instruction, kind: str) -> Operation:
    if kind != "f32":
        raise PtxError("functions of other types than float32")
    return _float32(instruction, _APPROXIMATE[instruction.words[0]], 1)


# -- bits -------------------------------------------------------------------------------------------------------------

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _logic(instruction: Instruction, kind: str) -> Operation:
    return _same(_LOGIC[instruction.words[0]], kind, 2)


def _not(instruction: Instruction, kind: str) -> Operation:
    return _same(np.invert, kind, 1)


def _shift(instruction: Instruction, kind: str) -> Operation:
    """By more than there are bits leaves 0, or the sign; numpy does the same."""
    shift, dtype = np.left_shift if instruction.words[0] == "shl" else np.right_shift, KINDS[kind]
    return Operation(lambda x, by: shift(x, np.minimum(by, np.uint32(64)).astype(dtype)), kind, (kind, "u32"))


def _extract(instruction: Instruction, kind: str) -> Operation:
    dtype = KINDS[kind]
    bits = 8 * dtype.itemsize

    def extract(x: Array, first: Array, count: Array) -> Array:
        first, count = (np.minimum(n & np.uint32(255), np.uint32(bits)).astype(np.int64) for n in (first, count))
        above = bits - np.minimum(first + count, bits)  # bits that are shifted out at the top, which holds the sign
        return np.where(count == 0, dtype.type(0), x << above.astype(dtype) >> (above + first).astype(dtype))

    return Operation(extract, kind, (kind, "u32", "u32"))


def _insert(instruction: Instruction, kind: str) -> Operation:
    dtype = KINDS[kind]

    def insert(piece: Array, whole: Array, first: Array, count: Array) -> Array:
        first, count = ((n & np.uint32(255)).astype(dtype) for n in (first, count))
        mask = ((dtype.type(1) << count) - dtype.type(1)) << first
        return (whole & ~mask) | (piece << first & mask)

    return Operation(insert, kind, (kind, kind, "u32", "u32"))


def _permute(instruction: Instruction, kind: str) -> Operation:
    """prmt: four of eight bytes; with the highest bit of a selector, the sign of the byte in all its bits."""
    if len(instruction.words) != 2:
        raise PtxError("modes of prmt")

    def permute(low: Array, high: Array, selector: Array) -> Array:
        both = np.asarray(high, np.uint64) << np.uint64(32) | low
        result: Array = np.uint32(0)
        for place in range(4):
            which = selector >> np.uint32(4 * place) & np.uint32(15)
            byte = (both >> np.asarray(which & np.uint32(7), np.uint64) * np.uint64(8)).astype(np.uint8)
            signs = (byte.view(np.int8) >> np.int8(7)).view(np.uint8)
            byte = np.where(which & np.uint32(8), signs, byte)
            result = result | byte.astype(np.uint32) << np.uint32(8 * place)
        return result

    return _same(permute, "b32", 3)


def _funnel_shift(instruction: Instruction, kind: str) -> Operation:
    left, wrap = instruction.has("l"), instruction.has("wrap")

    def shift(low: Array, high: Array, by: Array) -> Array:
        both = np.asarray(high, np.uint64) << np.uint64(32) | low
        count = np.asarray(by & np.uint32(31) if wrap else np.minimum(by, np.uint32(32)), np.uint64)
        return ((both << count) >> np.uint64(32) if left else both >> count).astype(np.uint32)

    return _same(shift, "b32", 3)


def _logic_table(instruction: Instruction, kind: str) -> Operation:
    """lop3: row 4a + 2b + c of its table, for each bit."""

    def combine(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = a & np.uint32(0)
        for row in range(8):
            term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            result = result | np.where(table >> np.uint32(row) & np.uint32(1), term, np.uint32(0))
        return result

    return _same(combine, "b32", 4)


def _count(instruction: Instruction, kind: str) -> Operation:
    return _same(lambda x: np.bitwise_count(x).astype(np.uint32), kind, 1, "u32")


# -- choices ----------------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "nan": lambda a, b: (a != a) | (b != b), "num": lambda a, b: (a == a) & (b == b),
}  # fmt: skip
_OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # true for a NaN


def _compare(instruction: Instruction, kind: str) -> Operation:
    if len(instruction.words) - instruction.has("ftz") != 3 or kind in HALVES:
        raise PtxError("comparisons with another predicate, or of 16-bit floats")
    name = instruction.words[1]
    if name in _OPPOSITE:
        opposite = _COMPARISONS[_OPPOSITE[name]]
        found: Callable[..., Array] = lambda a, b: ~opposite(a, b)
    else:
        found = np.not_equal if name == "ne" and kind[0] != "f" else _COMPARISONS[name]
    if instruction.has("ftz"):
        return _same(lambda a, b: found(flush(a), flush(b)), kind, 2, "pred")
    return _same(found, kind, 2, "pred")


def _select(instruction: Instruction, kind: str) -> Operation:
    return Operation(lambda yes, no, flag: np.where(flag, yes, no), kind, (kind, kind, "pred"))


# -- conversions ------------------------------------------------------------------------------------------------------

_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_BYTES = {"e4m3x2": ml_dtypes.float8_e4m3fn, "e5m2x2": ml_dtypes.float8_e5m2}


def _convert(instruction: Instruction, origin: str) -> Operation:
    to = instruction.words[-2]
    rounding = instruction.one_of("rn", "rz", "rna", "rm", "rp", *_WHOLE) or "rn"
    known = {"cvt", "sat", "ftz", "relu", "satfinite", rounding, to, origin}
    if not set(instruction.words) <= known or instruction.has("relu") or to not in KINDS or origin not in KINDS:
        raise PtxError("conversion")
    if to.endswith("x2") or origin.endswith("x2"):
        return _convert_pair(to, origin, rounding)
    if origin[0] in "us" and to[0] in "us":
        if instruction.has("sat"):
            raise PtxError("saturation of integers")
        return Operation(lambda x: np.asarray(x).astype(KINDS[to]), to, (origin,))
    if "f64" in (to, origin):
        raise PtxError("float64")
    read = (lambda x: widen(origin, x)) if origin in HALVES else np.asarray
    if to[0] in "us":
        whole, info = _WHOLE[rounding], np.iinfo(KINDS[to])

        def to_integer(x: Array) -> Array:  # beyond the range: its end; a NaN: 0
            exact = whole(np.asarray(read(x), np.float64))
            inside = np.clip(np.nan_to_num(exact, nan=0.0), float(info.min), float(info.max))
            if KINDS[to].itemsize == 8:
                raise PtxError("64-bit integers from floats")
            return inside.astype(np.int64).astype(KINDS[to])

        return Operation(to_integer, to, (origin,))
    sat, ftz = instruction.has("sat"), instruction.has("ftz")

    def to_float(x: Array) -> Array:
        exact = np.asarray(read(x), np.float64 if origin[0] in "us" else np.float32)
        exact = _WHOLE[rounding](exact) if rounding in _WHOLE else exact
        exact = flush(exact) if ftz else exact
        exact = saturate(exact) if sat else exact
        return exact.astype(np.float32) if to == "f32" else narrow(to, exact, "rn" if rounding in _WHOLE else rounding)

    if (to == "f32" and rounding in ("rz", "rm", "rp")) or (to == "bf16" and origin[0] in "us"):
        raise PtxError("conversion")
    return Operation(to_float, to, (origin,))


def _convert_pair(to: str, origin: str, rounding: str) -> Operation:
    """Two numbers in one register; of two operands the first goes to its upper half."""
    if to in ("f16x2", "bf16x2") and origin == "f32":
        half = to.removesuffix("x2")
        pack = lambda high, low: (
            narrow(half, high, rounding).astype(np.uint32) << np.uint32(16) | narrow(half, low, rounding)
        )
        return Operation(pack, to, ("f32", "f32"))
    if to == "f16x2" and origin in _BYTES:
        dtype = _BYTES[origin]
        spread = lambda x: np.ascontiguousarray(x).view(dtype).astype(np.float16).view(np.uint32)
        return Operation(spread, to, (origin,))
    if to in _BYTES and origin == "f32":
        dtype, limit = _BYTES[to], float(ml_dtypes.finfo(_BYTES[to]).max)
        byte = lambda x: np.clip(x, -limit, limit).astype(dtype).view(np.uint8).astype(np.uint16)
        return Operation(lambda high, low: byte(high) << np.uint16(8) | byte(low), to, ("f32", "f32"))
    raise PtxError("conversion")


_MAKERS: dict[str, Callable[[Instruction, str], Operation]] = {
    **dict.fromkeys(("add", "sub", "mul", "min", "max"), _binary),
    **dict.fromkeys(("mad", "fma"), _multiply_add),
    **dict.fromkeys(("div", "rem"), _divide),
    **dict.fromkeys(("neg", "abs", "copysign"), _sign),
    **dict.fromkeys(_APPROXIMATE, _approximate),
    **dict.fromkeys(_LOGIC, _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    "not": _not, "bfe": _extract, "bfi": _insert, "prmt": _permute, "shf": _funnel_shift, "lop3": _logic_table,
    "popc": _count, "setp": _compare, "selp": _select, "cvt": _convert,
}  # fmt: skip
