"""Logic, shifts, pieces of words, exact to the bit."""

import numpy as np

from ptx_emulator.arithmetic import Maker, Operation, same
from ptx_emulator.formats import KINDS, Array
from ptx_emulator.parser import Instruction, PtxError

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _logic(instruction: Instruction, kind: str) -> Operation:
    return same(_LOGIC[instruction.words[0]], kind, 2)


def _not(instruction: Instruction, kind: str) -> Operation:
    return same(np.invert, kind, 1)


def _shift(instruction: Instruction, kind: str) -> Operation:
    """By more than there are bits leaves 0, or the sign; numpy does the same."""
    shift, dtype = np.left_shift if instruction.words[0] == "shl" else np.right_shift, KINDS[kind]
    return Operation(lambda x, by: shift(x, np.minimum(by, np.uint32(64)).astype(dtype)), kind, (kind, "u32"))


def _extract(instruction: Instruction, kind: str) -> Operation:
    """bfe: so many bits from one on, extended by 0 or by the highest of them."""
    dtype = KINDS[kind]
    width = 8 * dtype.itemsize

    def extract(x: Array, first: Array, count: Array) -> Array:
        first, count = (np.minimum(n & np.uint32(255), np.uint32(width)).astype(np.int64) for n in (first, count))
        above = width - np.minimum(first + count, width)  # bits that are shifted out at the top, which holds the sign
        return np.where(count == 0, dtype.type(0), x << above.astype(dtype) >> (above + first).astype(dtype))

    return Operation(extract, kind, (kind, "u32", "u32"))


def _permute(instruction: Instruction, kind: str) -> Operation:
    """prmt: four of the eight bytes of two words; a selector with its highest bit set takes the byte's sign instead."""
    if instruction.words != ("prmt", "b32"):
        raise PtxError("another mode")

    def permute(low: Array, high: Array, selector: Array) -> Array:
        words = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, np.uint32)) for x in (low, high, selector)))
        eight = np.stack(words[:2], axis=-1).view(np.uint8)
        nibbles = words[2][:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        chosen = np.take_along_axis(eight, (nibbles & 7).astype(np.int64), axis=-1)
        signs = np.where(chosen >> np.uint8(7), np.uint8(255), np.uint8(0))
        return np.where(nibbles & 8, signs, chosen).view(np.uint32)[:, 0]

    return same(permute, "b32", 3)


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(_LOGIC, _logic),
    **dict.fromkeys(("shl", "shr"), _shift),
    "not": _not,
    "bfe": _extract,
    "prmt": _permute,
}
