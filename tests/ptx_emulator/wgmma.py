"""Hopper's wgmma: products of groups of four warps, in the background, of factors in shared memory.

A product runs as late as it may, when its group is waited for, with what registers and shared memory then hold. From
its start until then nobody may write what it reads. Its arithmetic is that of `matrices`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.matrices import (
    accumulate,
    gather_factor,
    gather_sums,
    numbers_in,
    registers_of,
    rows_from,
    scatter_sums,
)
from ptx_emulator.parser import Instruction, Literal, PtxError, Vector
from ptx_emulator.shared_memory import SHARED_BASE

if TYPE_CHECKING:
    from ptx_emulator.machine import Machine, Step, Where

GROUP = 128  # threads


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
    """A wgmma on its way, of several groups of threads; `lanes` are the first of each.

    `left` is None if it comes from registers. `keep`: whether it adds to the sums or replaces them.
    """

    lanes: np.ndarray
    group: np.ndarray
    left: Tile | None
    right: Tile
    keep: np.ndarray
    compute: Callable[[Product], None]

    def part(self, chosen: np.ndarray) -> Product:
        cut = lambda tile: tile and replace(tile, places=tile.places[chosen])
        arrays = {name: getattr(self, name)[chosen] for name in ("lanes", "group", "keep")}
        return replace(self, left=cut(self.left), right=cut(self.right), **arrays)

    def finish(self) -> None:
        self.compute(self)


def _warpgroup(machine: Machine, instruction: Instruction) -> Step:
    if instruction.words[1] == "fence":  # orders registers, which are in order here
        return lambda where: None
    if instruction.words[1] == "mma_async" and not instruction.has("sp"):
        return _multiply(machine, instruction)
    grouping = machine.products.bind(instruction)
    if grouping is None:
        raise PtxError("another wgmma")
    return grouping


def _multiply(machine: Machine, instruction: Instruction) -> Step:
    shape, result, kind, right_kind = instruction.words[4:8]
    columns, depth = (int(x) for x in shape.removeprefix("m64n").split("k"))
    if result != "f32" or kind != right_kind or (kind, depth) not in (("bf16", 16), ("f16", 16), ("tf32", 8)):
        raise PtxError("products of other types")
    into, left, right, keep, *immediate = instruction.operands
    negate_left, negate_right, *transposed = (x.integer() for x in immediate if isinstance(x, Literal))
    targets, keeps = registers_of(machine, into, "f32"), machine.full(keep, "pred")
    in_registers = isinstance(left, Vector)
    lefts = registers_of(machine, left, "b32") if in_registers else [machine.full(left, "u64")]
    rights, turned = machine.full(right, "u64"), [bool(x) for x in transposed]
    turned = [False] * (2 - len(turned)) + turned  # tf32 has none, and of registers there is only the right one's

    def tile(descriptors: np.ndarray, groups: np.ndarray, rows: int, transposed: bool) -> Tile:
        of_threads = descriptors.reshape(-1, GROUP)[groups]
        one = of_threads[:, 0]
        if np.any(one != of_threads.T):
            raise PtxError(f"the threads of a group do not agree on a descriptor: {instruction}")
        return Tile(places_of(one, rows, transposed), transposed)

    def step(where: Where) -> None:
        groups = machine.check_whole(where, GROUP, instruction)
        a = None if in_registers else tile(lefts[0], groups, 64, turned[0])
        b = tile(rights, groups, columns, turned[1])
        for one in filter(None, (a, b)):
            lanes = one.lanes(groups)
            report = machine.report(instruction, lanes, "shared")
            machine.shared.start_product(lanes, one.places.reshape(-1), report)
        first = groups * GROUP
        machine.products.running.append(Product(first, machine.products.closed[first], a, b, keeps[first], compute))

    def read(one: Tile, groups: np.ndarray) -> np.ndarray:
        return one.numbers(kind, machine.shared.finish_product(one.lanes(groups), one.places.reshape(-1)))

    def compute(product: Product) -> None:
        groups = product.lanes // GROUP
        warps = np.add.outer(4 * groups, np.arange(4)).reshape(-1)
        stacked = lambda x: x.reshape(len(groups), 64, -1)
        if product.left is None:
            a = stacked(rows_from(gather_factor(kind, lefts, warps)))
        else:
            a = read(product.left, groups)
        b = read(product.right, groups)
        sums = np.where(product.keep[:, None, None], stacked(gather_sums(targets, warps)), np.float32(0))
        sums = accumulate(sums, a * np.float32(negate_left), b * np.float32(negate_right))
        scatter_sums(sums.reshape(-1, 16, columns), targets, warps)

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
    """Writes of threads are in order here, but a wgmma sees them only after a fence of the asynchronous proxy."""
    if not instruction.has("proxy"):
        return lambda where: None
    if not instruction.has("async"):
        raise PtxError("fences of other proxies")
    return lambda where: machine.shared.fence(machine.lanes_of(where), machine.tick)


BINDERS = {"wgmma": _warpgroup, "fence": _fence}
