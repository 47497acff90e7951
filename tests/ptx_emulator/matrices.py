"""Instructions of whole warps on matrices: mma.sync, ldmatrix, stmatrix.

Products are exact in float32; sums are float32, in the order of k. A tensor core adds several products at once and cuts
bits off where this rounds; its errors are of the same size. Of tf32 it sees the upper 19 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

from ptx_emulator.formats import widen
from ptx_emulator.parser import Instruction, Operand, PtxError, Vector

if TYPE_CHECKING:
    from ptx_emulator.machine import Machine, Step, Where

WARP = 32


@numba.njit(cache=True)
def accumulate(sums, a, b):
    """Of each matrix sums + a @ b.T, in place."""
    for matrix in range(len(sums)):
        right = np.ascontiguousarray(b[matrix].T)
        for row in range(sums.shape[1]):
            line = sums[matrix, row]
            for k in range(a.shape[2]):
                factor = a[matrix, row, k]
                for column in range(line.size):
                    line[column] += factor * right[k, column]
    return sums


def numbers_in(kind: str, words: np.ndarray) -> np.ndarray:
    """float32 numbers in 32-bit words; the last axis, if they are 16-bit numbers, becomes twice as long."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    return widen(kind, words.view(np.uint16))


# -- fragments: which thread holds which entry ------------------------------------------------------------------------
# A warp holds 16 rows: thread 4 r + c has, of rows r and r + 8, the c-th piece of 32 bits (of sums: of two numbers).


def rows_from(registers: np.ndarray) -> np.ndarray:
    """Of `[warps, 32 threads, registers, entries of a register or pair]`: `[warps, 16, columns]`."""
    warps, _, count, entries = registers.shape
    parts = registers.reshape(warps, 8, 4, count // 2, 2, entries)  # warp, row, piece, along columns, half, entry
    return np.ascontiguousarray(parts.transpose(0, 4, 1, 3, 2, 5)).reshape(warps, 16, -1)


def rows_to(matrix: np.ndarray) -> np.ndarray:
    """Sums `[warps, 16, columns]` as `[warps, 32 threads, registers]`."""
    parts = matrix.reshape(len(matrix), 2, 8, -1, 4, 2)  # warp, half, row, along columns, piece, entry
    return np.ascontiguousarray(parts.transpose(0, 2, 4, 3, 1, 5)).reshape(len(matrix), WARP, -1)


def columns_from(registers: np.ndarray) -> np.ndarray:
    """The right factor of mma.sync, `[warps, 32 threads, registers, entries]`, as `[warps, 8, k]`."""
    warps, _, count, entries = registers.shape
    parts = registers.reshape(warps, 8, 4, count, entries)
    return np.ascontiguousarray(parts.transpose(0, 1, 3, 2, 4)).reshape(warps, 8, -1)


def registers_of(machine: Machine, operand: Operand, kind: str) -> list[np.ndarray]:
    if not isinstance(operand, Vector):
        raise PtxError(f"{operand} is no vector of registers")
    return [machine.full(part, kind) for part in operand.parts]


def gather(registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
    """`[warps, 32 threads, registers]`"""
    return np.stack([x.reshape(-1, WARP)[warps] for x in registers], axis=-1)


def gather_sums(registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
    pairs = gather(registers, warps)
    return rows_from(pairs.reshape(*pairs.shape[:2], -1, 2))


def gather_factor(kind: str, registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
    """`[warps, 32 threads, registers, numbers of a register]`"""
    words = gather(registers, warps)
    return numbers_in(kind, words).reshape(*words.shape, -1)


def scatter_sums(sums: np.ndarray, registers: list[np.ndarray], warps: np.ndarray) -> None:
    for register, values in zip(registers, np.moveaxis(rows_to(sums), -1, 0)):
        register.reshape(-1, WARP)[warps] = values


# -- mma.sync ---------------------------------------------------------------------------------------------------------

_SHAPES = {"bf16": ("m16n8k8", "m16n8k16"), "f16": ("m16n8k8", "m16n8k16"), "tf32": ("m16n8k4", "m16n8k8")}


def _multiply(machine: Machine, instruction: Instruction) -> Step:
    shape, *types = instruction.words[3:]
    kind = types[3]
    if shape not in _SHAPES.get(kind, ()) or types != ["row", "col", "f32", kind, kind, "f32"]:
        raise PtxError("products of other shapes or types")
    into, left, right, start = instruction.operands
    targets, starts = registers_of(machine, into, "f32"), registers_of(machine, start, "f32")
    lefts, rights = registers_of(machine, left, "b32"), registers_of(machine, right, "b32")

    def step(where: Where) -> None:
        warps = machine.check_whole(where, WARP, instruction)
        a, b = gather_factor(kind, lefts, warps), gather_factor(kind, rights, warps)
        scatter_sums(accumulate(gather_sums(starts, warps), rows_from(a), columns_from(b)), targets, warps)

    return step


# -- ldmatrix, stmatrix -----------------------------------------------------------------------------------------------


def _move_matrices(machine: Machine, instruction: Instruction) -> Step:
    """Thread i has the address of row i % 8 of matrix i / 8, and holds piece i % 4 of row (trans: column) i / 4."""
    many = instruction.one_of("x1", "x2", "x4")
    if many is None or not {"m8n8", "shared", "b16"} <= set(instruction.words):
        raise PtxError("matrices of other shapes or types")
    count, loads, transposed = int(many[1]), instruction.words[0] == "ldmatrix", instruction.has("trans")
    vector, memory = instruction.operands if loads else instruction.operands[::-1]
    registers, place = registers_of(machine, vector, "b32"), machine.address(memory, "shared")

    def turned(words: np.ndarray) -> np.ndarray:
        """From or to rows in memory, `[warps, matrices, 8, 4 words]`."""
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        return np.ascontiguousarray(halves.swapaxes(2, 3) if transposed else halves).view(np.uint32)

    def step(where: Where) -> None:
        warps = machine.check_whole(where, WARP, instruction)
        lanes = np.add.outer(WARP * warps, np.arange(8 * count)).reshape(-1)
        report = machine.report(instruction, lanes, "shared")
        if loads:
            words = turned(machine.shared.load(lanes, place(lanes), 16, 16, report))
            for number, register in enumerate(registers):
                register.reshape(-1, WARP)[warps] = words[:, number].reshape(-1, WARP)
        else:
            rows = turned(gather(registers, warps).swapaxes(1, 2)).reshape(-1, 4).view(np.uint8)
            machine.shared.store(lanes, place(lanes), rows, 16, machine.tick, report)

    return step


BINDERS = {"mma": _multiply, "ldmatrix": _move_matrices, "stmatrix": _move_matrices}
