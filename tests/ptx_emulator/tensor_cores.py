"""Instructions of whole warps on matrices: mma.sync, ldmatrix, stmatrix, and Hopper's wgmma.

Products are exact in float32; sums are float32, in the order of k. A tensor core adds several products at once and cuts
bits off where this rounds; its errors are of the same size. Of tf32 it sees the upper 19 bits.

A wgmma runs as late as it may, when its group is waited for, with what registers and shared memory then hold. From the
start until then nobody may write what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numba
import numpy as np

from ptx_emulator.arithmetic import widen
from ptx_emulator.memory import SHARED_BASE
from ptx_emulator.parser import Instruction, Literal, Operand, PtxError, Vector

if TYPE_CHECKING:
    from ptx_emulator.machine import Machine, Step, Where

WARP, GROUP = 32, 128  # threads


@numba.njit(cache=True)
def accumulate(total, a, b):
    """Of each matrix total + a @ b.T"""
    for matrix in range(total.shape[0]):
        columns = np.ascontiguousarray(b[matrix].T)
        for m in range(total.shape[1]):
            for k in range(a.shape[2]):
                factor = a[matrix, m, k]
                for n in range(total.shape[2]):
                    total[matrix, m, n] += factor * columns[k, n]
    return total


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
    warps = len(matrix)
    parts = matrix.reshape(warps, 2, 8, -1, 4, 2)  # warp, half, row, along columns, piece, entry
    return np.ascontiguousarray(parts.transpose(0, 2, 4, 3, 1, 5)).reshape(warps, WARP, -1)


def columns_from(registers: np.ndarray) -> np.ndarray:
    """The right factor of mma.sync, `[warps, 32 threads, registers, entries]`, as `[warps, 8, k]`."""
    warps, _, count, entries = registers.shape
    parts = registers.reshape(warps, 8, 4, count, entries)
    return np.ascontiguousarray(parts.transpose(0, 1, 3, 2, 4)).reshape(warps, 8, -1)


def _gather(registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
    """`[warps, 32 threads, registers]`"""
    return np.stack([x.reshape(-1, WARP)[warps] for x in registers], axis=-1)


def _factor(kind: str, registers: list[np.ndarray], warps: np.ndarray) -> np.ndarray:
    words = _gather(registers, warps)
    return numbers_in(kind, words).reshape(*words.shape, -1)


# -- mma.sync ---------------------------------------------------------------------------------------------------------

_MMA = {("m16n8k8", "bf16"), ("m16n8k16", "bf16"), ("m16n8k8", "f16"), ("m16n8k16", "f16"), ("m16n8k4", "tf32")}
_MMA |= {("m16n8k8", "tf32")}


def _registers(machine: Machine, operand: Operand, kind: str) -> list[np.ndarray]:
    if not isinstance(operand, Vector):
        raise PtxError(f"{operand} are no registers")
    return [machine.full(part, kind) for part in operand.parts]


def _multiply(machine: Machine, instruction: Instruction) -> Step:
    shape, *more = instruction.words[3:]
    kind = more[3]
    if (shape, kind) not in _MMA or more != ["row", "col", "f32", kind, kind, "f32"]:
        raise PtxError("products of other shapes or types")
    to, left, right, before = instruction.operands
    targets, befores = _registers(machine, to, "f32"), _registers(machine, before, "f32")
    lefts, rights = _registers(machine, left, "b32"), _registers(machine, right, "b32")

    def step(where: Where) -> None:
        warps = machine.units_of(where, WARP, instruction)
        a, b = rows_from(_factor(kind, lefts, warps)), columns_from(_factor(kind, rights, warps))
        sums = rows_from(_gather(befores, warps)[..., [[0, 1], [2, 3]]])
        _scatter(accumulate(sums, a, b), targets, warps)

    return step


def _scatter(sums: np.ndarray, targets: list[np.ndarray], warps: np.ndarray) -> None:
    parts = rows_to(sums)
    for number, target in enumerate(targets):
        target.reshape(-1, WARP)[warps] = parts[..., number]


# -- ldmatrix, stmatrix -----------------------------------------------------------------------------------------------


def _matrices(instruction: Instruction) -> int:
    count = instruction.one_of("x1", "x2", "x4")
    if count is None or not {"m8n8", "shared", "b16"} <= set(instruction.words):
        raise PtxError("matrices of other shapes or types")
    return int(count[1])


def _load_matrices(machine: Machine, instruction: Instruction) -> Step:
    """Thread i has the address of row i % 8 of matrix i / 8, and gets piece i % 4 of row (trans: column) i / 4."""
    count, transposed = _matrices(instruction), instruction.has("trans")
    to, origin = instruction.operands
    targets, place = _registers(machine, to, "b32"), machine.address(origin, "shared")

    def step(where: Where) -> None:
        warps = machine.units_of(where, WARP, instruction)
        lanes = (WARP * warps[:, None] + np.arange(8 * count)).reshape(-1)
        data = machine.shared.load(lanes, place(lanes), 16, 16, machine.report(instruction, lanes, "shared"))
        rows = data.view(np.uint16).reshape(-1, count, 8, 8)
        words = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows).view(np.uint32)
        for number, target in enumerate(targets):
            target.reshape(-1, WARP)[warps] = words[:, number].reshape(-1, WARP)

    return step


def _store_matrices(machine: Machine, instruction: Instruction) -> Step:
    count, transposed = _matrices(instruction), instruction.has("trans")
    to, origin = instruction.operands
    sources, place = _registers(machine, origin, "b32"), machine.address(to, "shared")

    def step(where: Where) -> None:
        warps = machine.units_of(where, WARP, instruction)
        lanes = (WARP * warps[:, None] + np.arange(8 * count)).reshape(-1)
        words = np.ascontiguousarray(_gather(sources, warps).swapaxes(1, 2))  # [warps, matrices, 32]
        rows = words.view(np.uint16).reshape(-1, count, 8, 8)
        data = np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows).reshape(-1, 8).view(np.uint8)
        report = machine.report(instruction, lanes, "shared")
        machine.shared.store(lanes, place(lanes), data, 16, machine.tick, report)

    return step


# -- wgmma ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A factor in shared memory: places of 16 bytes `[groups, outer, inner]`, and how they become `[rows, k]`.

    `transposed`: outer is k and inner are pieces of 8 rows; else outer are rows and inner two pieces of k.
    """

    places: np.ndarray
    transposed: bool

    def lanes(self, groups: np.ndarray) -> np.ndarray:
        return np.repeat(groups * GROUP, self.places[0].size)

    def numbers(self, kind: str, data: np.ndarray) -> np.ndarray:
        groups, outer, _ = self.places.shape
        numbers = numbers_in(kind, data.view(np.uint32)).reshape(groups, outer, -1)
        return np.ascontiguousarray(numbers.swapaxes(1, 2)) if self.transposed else numbers


@dataclass(frozen=True)
class Product:
    """A wgmma on its way: of which groups of threads, which group of each (`commit_group`) it belongs to, its factors.

    `left` is None if it comes from registers. `keep`: whether it adds to the sums or replaces them.
    """

    groups: np.ndarray
    issued: np.ndarray
    left: Tile | None
    right: Tile
    keep: np.ndarray
    finish: Callable[[Product], None]

    def part(self, chosen: np.ndarray) -> Product:
        cut = lambda tile: tile and replace(tile, places=tile.places[chosen])
        groups, issued, keep = self.groups[chosen], self.issued[chosen], self.keep[chosen]
        return replace(self, groups=groups, issued=issued, keep=keep, left=cut(self.left), right=cut(self.right))


def _warpgroup(machine: Machine, instruction: Instruction) -> Step:
    what = instruction.words[1]
    if what == "fence":  # orders registers, which are in order here
        return lambda where: None
    if what == "commit_group":

        def close(where: Where) -> None:
            machine.product_group[machine.select(where)] += 1

        return close
    if what == "wait_group":
        (left,) = instruction.operands
        running = left.integer() if isinstance(left, Literal) else 0
        return lambda where: _await(machine, where, running)
    if what != "mma_async" or instruction.has("sp"):
        raise PtxError("this kind of wgmma")
    return _start_product(machine, instruction)


def _await(machine: Machine, where: Where, running: int) -> None:
    """All groups but the last `running`, in the order in which they were started."""
    remaining = []
    for product in machine.products:
        lanes = product.groups * GROUP
        done = product.issued < machine.product_group[lanes] - running
        if where is not True:
            done &= where[lanes]
        if done.any():
            product.finish(product.part(done))
        if not done.all():
            remaining.append(product.part(~done))
    machine.products[:] = remaining


def _start_product(machine: Machine, instruction: Instruction) -> Step:
    shape, result, kind, right_kind = instruction.words[4:8]
    columns, depth = (int(x) for x in shape.removeprefix("m64n").split("k"))
    if result != "f32" or kind != right_kind or (kind, depth) not in (("bf16", 16), ("f16", 16), ("tf32", 8)):
        raise PtxError("products of other types")
    to, left, right, keep, *immediate = instruction.operands
    negate_left, negate_right, *transposed = (x.integer() for x in immediate if isinstance(x, Literal))
    targets, keeps = _registers(machine, to, "f32"), machine.full(keep, "pred")
    in_registers = isinstance(left, Vector)
    lefts = _registers(machine, left, "b32") if in_registers else [machine.full(left, "u64")]
    rights, turned = machine.full(right, "u64"), [bool(x) for x in transposed]
    turned = [False] * (2 - len(turned)) + turned  # tf32 has none, and of registers there is only the right one's

    def tile(descriptors: np.ndarray, groups: np.ndarray, rows: int, transposed: bool) -> Tile:
        each = descriptors.reshape(-1, GROUP)[groups]
        if (each != each[:, :1]).any():
            raise PtxError(f"threads of a warpgroup have different descriptors: {instruction}")
        return Tile(places_of(each[:, 0], rows, transposed), transposed)

    def step(where: Where) -> None:
        groups = machine.units_of(where, GROUP, instruction)
        a = None if in_registers else tile(lefts[0], groups, 64, turned[0])
        b = tile(rights, groups, columns, turned[1])
        for one in filter(None, (a, b)):
            lanes = one.lanes(groups)
            report = machine.report(instruction, lanes, "shared")
            machine.shared.start_product(lanes, one.places.reshape(-1), report)
        issued, keep = machine.product_group[groups * GROUP], keeps[groups * GROUP]
        machine.products.append(Product(groups, issued, a, b, keep, finish))

    def read(one: Tile, groups: np.ndarray) -> np.ndarray:
        return one.numbers(kind, machine.shared.finish_product(one.lanes(groups), one.places.reshape(-1)))

    def finish(product: Product) -> None:
        groups = product.groups
        warps = (4 * groups[:, None] + np.arange(4)).reshape(-1)
        stacked = lambda x: x.reshape(len(groups), 64, -1)
        from_registers = lambda: stacked(rows_from(_factor(kind, lefts, warps)))
        a = from_registers() if product.left is None else read(product.left, groups)
        b = read(product.right, groups)
        pairs = _gather(targets, warps)
        sums = stacked(rows_from(pairs.reshape(*pairs.shape[:2], -1, 2)))
        sums = np.where(product.keep[:, None, None], sums, np.float32(0))
        sums = accumulate(sums, a * np.float32(negate_left), b * np.float32(negate_right))
        _scatter(sums.reshape(-1, 16, columns), targets, warps)

    return step


def places_of(descriptors: np.ndarray, rows: int, transposed: bool) -> np.ndarray:
    """Where in shared memory the pieces of 16 bytes lie that descriptors speak of (PTX ISA, "matrix descriptor").

    A piece is 8 numbers (4 of tf32) along k, or along the rows if that is how the matrix lies. Without swizzling 8 of
    them, 128 bytes, make a core matrix. With it, 2, 4 or 8 pieces lie side by side, and address bits 4 to 6 are
    exchanged by bits 7 to 9.
    """
    field = lambda first, bits: (descriptors >> np.uint64(first) & np.uint64((1 << bits) - 1)).astype(np.int64)
    start, leading, stride = (16 * field(first, 14)[:, None, None] for first in (0, 16, 32))
    swizzle = field(62, 2)
    if field(49, 3).any() or (swizzle != swizzle[0]).any():
        raise PtxError("descriptors with a base offset, or with different swizzles")
    beside = {0: 1, 1: 8, 2: 4, 3: 2}[int(swizzle[0])]  # pieces
    if transposed:
        k, piece = np.arange(16)[:, None], np.arange(rows // 8)[None]
        if beside == 1:
            places = start + k % 8 * 16 + k // 8 * leading + piece * stride
        else:
            places = start + piece % beside * 16 + piece // beside * leading + k % 8 * 16 * beside + k // 8 * stride
    else:
        row, piece = np.arange(rows)[:, None], np.arange(2)[None]
        places = start + row % 8 * 16 * beside + row // 8 * stride + piece * (leading if beside == 1 else 16)
    return (places ^ (places >> 7 & beside - 1) << 4) - SHARED_BASE


def _fence(machine: Machine, instruction: Instruction) -> Step:
    """What orders memory is in order here; but wgmma has a view of its own."""
    if not instruction.has("proxy"):
        return lambda where: None
    if not instruction.has("async"):
        raise PtxError("fences of other proxies")
    return lambda where: machine.shared.fence(machine.lanes_of(where), machine.tick)


BINDERS = {
    "mma": _multiply, "ldmatrix": _load_matrices, "stmatrix": _store_matrices, "wgmma": _warpgroup, "fence": _fence,
}  # fmt: skip
