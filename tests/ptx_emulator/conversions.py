"""cvt: from one format of numbers to another."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from ptx_emulator.arithmetic import Maker, Operation
from ptx_emulator.formats import HALVES, KINDS, Array, flush, narrow, saturate, widen
from ptx_emulator.parser import Instruction, PtxError

_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_BYTES = {"e4m3x2": ml_dtypes.float8_e4m3fn, "e5m2x2": ml_dtypes.float8_e5m2}


def _convert(instruction: Instruction, origin: str) -> Operation:
    to = instruction.words[-2]
    rounding = instruction.one_of("rn", "rna", *_WHOLE) or "rn"
    known = {"cvt", "sat", "ftz", rounding, to, origin}
    if not set(instruction.words) <= known or to not in KINDS or origin not in KINDS:
        raise PtxError("conversion")
    if to.endswith("x2") or origin.endswith("x2"):
        return _pair(to, origin, rounding)
    if to[0] in "us" and origin[0] in "us":
        if instruction.has("sat"):
            raise PtxError("saturation of integers")
        return Operation(lambda x: np.asarray(x).astype(KINDS[to]), to, (origin,))
    read = (lambda x: widen(origin, x)) if origin in HALVES else np.asarray
    if to[0] in "us":
        return _to_integer(to, origin, _WHOLE[rounding], read)
    return _to_float(instruction, to, origin, rounding, read)


def _to_integer(to: str, origin: str, whole: Callable[[Array], Array], read: Callable[[Array], Array]) -> Operation:
    """Beyond the range: its end; a NaN: 0."""
    info = np.iinfo(KINDS[to])
    if info.bits == 64:
        raise PtxError("64-bit integers from floats")

    def convert(x: Array) -> Array:
        exact = whole(np.asarray(read(x), np.float64))
        inside = np.clip(np.nan_to_num(exact, nan=0.0), float(info.min), float(info.max))
        return inside.astype(np.int64).astype(KINDS[to])

    return Operation(convert, to, (origin,))


def _to_float(
    instruction: Instruction, to: str, origin: str, rounding: str, read: Callable[[Array], Array]
) -> Operation:
    if to == "bf16" and origin[0] in "us":
        raise PtxError("conversion")  # would round twice
    steps: list[Callable[[Array], Array]] = [_WHOLE[rounding]] if rounding in _WHOLE else []
    steps += [step for word, step in (("ftz", flush), ("sat", saturate)) if instruction.has(word)]
    last = "rn" if rounding in _WHOLE else rounding

    def convert(x: Array) -> Array:
        exact = np.asarray(read(x), np.float64 if origin[0] in "us" else np.float32)
        for step in steps:
            exact = step(exact)
        return exact.astype(np.float32) if to == "f32" else narrow(to, exact, last)

    return Operation(convert, to, (origin,))


def _pair(to: str, origin: str, rounding: str) -> Operation:
    """Two numbers in one register; of two operands the first goes to its upper half."""
    if to in ("f16x2", "bf16x2") and origin == "f32":
        half = lambda x: narrow(to.removesuffix("x2"), x, rounding).astype(np.uint32)
        return Operation(lambda high, low: half(high) << np.uint32(16) | half(low), to, ("f32", "f32"))
    if to == "f16x2" and origin in _BYTES:
        spread = lambda x: np.ascontiguousarray(x).view(_BYTES[origin]).astype(np.float16).view(np.uint32)
        return Operation(spread, to, (origin,))
    raise PtxError("conversion")


MAKERS: dict[str, Maker] = {"cvt": _convert}
