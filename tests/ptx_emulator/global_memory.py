"""Global memory that forgives nothing.

What is touched lies in an argument of the kernel, at a multiple of its width. Inputs are read, outputs written: each
byte by one thread block, and twice only with the same value.
"""

import math

import numba
import numpy as np

from ptx_emulator.faults import MISALIGNED, MISSING, OUTSIDE, RACE, READ_ONLY, REWRITTEN, UNWRITTEN, Faults, Report

BASE = 0x7E00_0000_0000  # so that addresses cut to 32 bits point nowhere
GAP = 4096  # bytes between two arguments, which belong to nobody
POISON = 0xFF  # a NaN in every floating-point format
NOBODY, INPUT = -1, -2  # instead of the block that wrote a byte


@numba.njit(cache=True)
def _misplaced(owner, place, size, align):
    if place < 0 or place + size > owner.size or owner[place] < 0 or owner[place + size - 1] != owner[place]:
        return OUTSIDE
    return MISALIGNED if place % align else 0


@numba.njit(cache=True)
def _load(arena, owner, writer, blocks, places, sizes, align, out, problem):
    bad = 0
    for i in range(places.size):
        place, size, wrong = places[i], sizes[i], 0
        if size:
            wrong = _misplaced(owner, place, size, align)
        out[i, :] = 0
        if wrong == 0:
            out[i, :size] = arena[place : place + size]
            for author in writer[place : place + size]:
                if author == NOBODY:
                    wrong = UNWRITTEN
                elif author != INPUT and author != blocks[i]:
                    wrong = RACE
        problem[i] = wrong
        bad += wrong != 0
    return bad


@numba.njit(cache=True)
def _store(arena, owner, writer, blocks, places, data, align, problem):
    bad = 0
    for i in range(places.size):
        wrong = _misplaced(owner, places[i], data.shape[1], align)
        for byte in range(data.shape[1] if wrong == 0 else 0):
            at, author = places[i] + byte, writer[places[i] + byte]
            if author == INPUT:
                wrong = READ_ONLY
                break
            if author != NOBODY and (author != blocks[i] or arena[at] != data[i, byte]):
                wrong = REWRITTEN
            arena[at], writer[at] = data[i, byte], blocks[i]
        problem[i] = wrong
        bad += wrong != 0
    return bad


class GlobalMemory:
    """The arguments of a kernel, inputs first, with gaps between them."""

    def __init__(self, inputs: list[np.ndarray], outputs: list[tuple[tuple[int, ...], np.dtype]]) -> None:
        self.outputs, self.input_count = outputs, len(inputs)
        self.sizes = [x.nbytes for x in inputs] + [math.prod(shape) * dtype.itemsize for shape, dtype in outputs]
        room = [-(-(size + GAP) // 256) * 256 for size in self.sizes]
        self.starts = [GAP + sum(room[:number]) for number in range(len(room))]
        total = GAP + sum(room)
        self.arena = np.full(total, POISON, np.uint8)
        self.owner, self.writer = np.full(total, -1, np.int16), np.full(total, NOBODY, np.int32)
        for number in range(len(self.sizes)):
            self.owner[self.part(number)] = number
        for number, values in enumerate(inputs):
            self.arena[self.part(number)] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
            self.writer[self.part(number)] = INPUT

    def part(self, number: int) -> slice:
        return slice(self.starts[number], self.starts[number] + self.sizes[number])

    def address(self, argument: int) -> int:
        """Beyond the arguments come pointers to scratch memory, of which these kernels need none: 0."""
        return BASE + self.starts[argument] if argument < len(self.starts) else 0

    def load(self, blocks, addresses, sizes, align: int, most: int, report: Report) -> np.ndarray:
        """`[threads, most]` bytes, zeros beyond the size that each thread asks for."""
        places, problem = addresses - BASE, np.empty(addresses.size, np.uint8)
        out = np.empty((addresses.size, most), np.uint8)
        if _load(self.arena, self.owner, self.writer, blocks, places, sizes, align, out, problem):
            report(problem, places)
        return out

    def store(self, blocks, addresses, data: np.ndarray, align: int, report: Report) -> None:
        places, problem = addresses - BASE, np.empty(addresses.size, np.uint8)
        if _store(self.arena, self.owner, self.writer, blocks, places, data, align, problem):
            report(problem, places)

    def describe(self, place: int) -> str:
        """Relative to the argument that begins before it, or in the second half of the gap after it."""
        before = [number for number, start in enumerate(self.starts) if start - GAP // 2 <= place]
        number = before[-1] if before else 0
        return f"byte {place - self.starts[number]} of the {self.sizes[number]} of argument {number}"

    def results(self) -> list[np.ndarray]:
        parts = (self.arena[self.part(number)].copy() for number in range(self.input_count, len(self.sizes)))
        return [part.view(dtype).reshape(shape) for part, (shape, dtype) in zip(parts, self.outputs)]

    def find_unwritten(self, faults: Faults) -> None:
        for number, size in list(enumerate(self.sizes))[self.input_count :]:
            missing = np.count_nonzero(self.writer[self.part(number)] == NOBODY)
            if missing:
                faults.add(MISSING, f"argument {number}", f"{missing} of {size} bytes")
