"""Sums, products, comparisons: what one thread computes by itself, as functions of numpy arrays.

Integers are exact to the bit. Float arithmetic is rounded once, as told, denormals and `.ftz` included. Functions that
a GPU only approximates (ex2, rcp, div.full) are nearly exact here: a GPU is off by a unit or two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx_emulator.formats import (
    HALVES,
    KINDS,
    Array,
    flush,
    fused_multiply_add,
    fused_multiply_add_down,
    narrow,
    saturate,
    widen,
)
from ptx_emulator.parser import Instruction, PtxError

Function = Callable[..., Array]


@dataclass(frozen=True)
class Operation:
    """`function` of arrays of the kinds `sources` gives one of the kind `result`."""

    function: Function
    result: str
    sources: tuple[str, ...]


Maker = Callable[[Instruction, str], Operation]  # `kind` is the last word of the opcode; raises for unknown forms


def same(function: Function, kind: str, count: int, result: str | None = None) -> Operation:
    return Operation(function, result or kind, (kind,) * count)


def _float32(instruction: Instruction, exact: Function, count: int) -> Operation:
    """`exact` rounds to nearest. Modifiers change what goes in, and what comes out."""
    if instruction.has("rm", "rp", "rz"):
        raise PtxError("roundings in a direction")
    before = flush if instruction.has("ftz") else None
    after = [step for word, step in (("ftz", flush), ("sat", saturate)) if instruction.has(word)]

    def modified(*sources: Array) -> Array:
        result = exact(*(sources if before is None else map(before, sources)))
        for step in after:
            result = step(result)
        return result

    return same(modified if before or after else exact, "f32", count)


def _halves(instruction: Instruction, function: Function, kind: str) -> Operation:
    """On one or two 16-bit numbers, through a precision that makes the one rounding at the end the only one."""
    if instruction.has("sat", "ftz"):
        raise PtxError("saturation and flushing of 16-bit numbers")
    half = kind.removesuffix("x2")

    def compute(*sources: Array) -> Array:
        parts = [np.ascontiguousarray(x).view(np.uint16) for x in np.broadcast_arrays(*sources)]
        return narrow(half, function(*(widen(half, x) for x in parts))).view(KINDS[kind])

    return same(compute, kind, 2)


# -- sums and products ------------------------------------------------------------------------------------------------

_BINARY: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_EXTREMES = {"min": (np.minimum, np.fmin), "max": (np.maximum, np.fmax)}  # the second ignores a NaN


def _binary(instruction: Instruction, kind: str) -> Operation:
    root, whole = instruction.words[0], kind[0] in "us"
    if instruction.has("cc") or (instruction.has("sat") and whole):
        raise PtxError("carries and saturation of integers")
    if whole and instruction.has("wide", "hi"):
        return _wide_product(kind, instruction.has("hi"))
    keeps_nan = whole or instruction.has("NaN")
    function = _EXTREMES[root][0 if keeps_nan else 1] if root in _EXTREMES else _BINARY[root]
    if kind in HALVES:
        return _halves(instruction, function, kind)
    return _float32(instruction, function, 2) if kind == "f32" else same(function, kind, 2)


def _doubled(kind: str) -> str:
    if kind[1:] == "64":
        raise PtxError("128-bit products")
    return f"{kind[0]}{2 * int(kind[1:])}"


def _wide_product(kind: str, high: bool) -> Operation:
    single, wide = KINDS[kind], KINDS[_doubled(kind)]
    product = lambda a, b: np.multiply(a, b, dtype=wide)
    if not high:
        return same(product, kind, 2, _doubled(kind))
    return same(lambda a, b: (product(a, b) >> wide.type(8 * single.itemsize)).astype(single), kind, 2)


def _multiply_add(instruction: Instruction, kind: str) -> Operation:
    if instruction.words == ("fma", "rm", "f32"):
        return same(fused_multiply_add_down, kind, 3)
    if kind == "f32":
        return _float32(instruction, fused_multiply_add, 3)
    if not instruction.has("lo") or kind in HALVES:
        raise PtxError("products added in another precision")
    return same(lambda a, b, c: a * b + c, kind, 3)


def _divide(instruction: Instruction, kind: str) -> Operation:
    if kind == "f32":
        return _float32(instruction, np.divide, 2)

    def divided(a: Array, b: Array) -> tuple[Array, Array]:
        b = np.where(b == 0, KINDS[kind].type(1), b)  # the result is unspecified on a GPU
        rest = np.fmod(a, b)  # with the sign of a, as in C
        return (a - rest) // b, rest

    return same(lambda a, b: divided(a, b)[instruction.words[0] == "rem"], kind, 2)


def _sign(instruction: Instruction, kind: str) -> Operation:
    root = instruction.words[0]
    if kind in HALVES:
        raise PtxError("signs of 16-bit numbers")
    if root == "copysign":
        return same(lambda sign, size: np.copysign(size, sign), kind, 2)
    function = np.negative if root == "neg" else np.abs
    return _float32(instruction, function, 1) if kind == "f32" else same(function, kind, 1)


_APPROXIMATE: dict[str, Function] = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "tanh": np.tanh}


def _approximate(instruction: Instruction, kind: str) -> Operation:
    if kind != "f32":
        raise PtxError("functions of other types than float32")
    return _float32(instruction, _APPROXIMATE[instruction.words[0]], 1)


# -- choices ----------------------------------------------------------------------------------------------------------

_COMPARISONS: dict[str, Function] = {
    "eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "gt": np.greater, "le": np.less_equal,
    "ge": np.greater_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b), "num": lambda a, b: (a == a) & (b == b),
}  # fmt: skip
_OPPOSITE = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # true for a NaN
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _compare(instruction: Instruction, kind: str) -> Operation:
    if len(instruction.words) != 3 or kind in HALVES:
        raise PtxError("comparisons of another kind")
    name = _UNSIGNED.get(instruction.words[1], instruction.words[1])
    if name in _OPPOSITE:
        opposite = _COMPARISONS[_OPPOSITE[name]]
        return same(lambda a, b: ~opposite(a, b), kind, 2, "pred")
    return same(np.not_equal if name == "ne" and kind[0] != "f" else _COMPARISONS[name], kind, 2, "pred")


def _select(instruction: Instruction, kind: str) -> Operation:
    return Operation(lambda yes, no, flag: np.where(flag, yes, no), kind, (kind, kind, "pred"))


MAKERS: dict[str, Maker] = {
    **dict.fromkeys((*_BINARY, *_EXTREMES), _binary),
    **dict.fromkeys(("mad", "fma"), _multiply_add),
    **dict.fromkeys(("div", "rem"), _divide),
    **dict.fromkeys(("neg", "abs", "copysign"), _sign),
    **dict.fromkeys(_APPROXIMATE, _approximate),
    "setp": _compare,
    "selp": _select,
}
