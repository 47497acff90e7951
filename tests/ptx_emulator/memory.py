"""Global and shared memory that forgive nothing.

Global memory: what is touched lies in an argument of the kernel, at a multiple of its width. Inputs are read, outputs
written: each byte by one thread block, and twice only with the same value.

Shared memory, of each block: what is read was written before. Two warps that touch the same bytes, one of them writing,
without a barrier in between, race. Copies in the background arrive when they are waited for, and until then their bytes
belong to nobody. What a wgmma may still read is not written. What threads have written passes a `fence.proxy.async`
before a wgmma reads it: in the thread that wrote it, or, after a barrier, in the one that multiplies.

A stamp is 64 times the barriers that a block has passed, plus the warp. Shared memory is watched in granules as large
as the narrowest access of the kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numba
import numpy as np

GLOBAL_BASE = 0x7E00_0000_0000  # so that addresses cut to 32 bits point nowhere
GAP = 4096  # bytes between two arguments, which belong to nobody
SHARED_BASE = 1024  # descriptors want multiples of 1024; 0 is nowhere
POISON = 0xFF  # a NaN in every floating-point format
SEVERAL = 63  # instead of a warp

OUTSIDE, MISALIGNED, READ_ONLY, UNWRITTEN, REWRITTEN, RACE, IN_FLIGHT, IN_USE, UNFENCED = range(1, 10)
MEANINGS = {
    OUTSIDE: "out of bounds",
    MISALIGNED: "misaligned",
    READ_ONLY: "write to an input",
    UNWRITTEN: "read of memory that nobody wrote",
    REWRITTEN: "written twice",
    RACE: "race",
    IN_FLIGHT: "touches a copy that is still on its way",
    IN_USE: "writes what a wgmma may still read",
    UNFENCED: "a wgmma reads what threads wrote, without a fence",
}
Report = Callable[[np.ndarray, np.ndarray], None]  # problems, and places they are at


@dataclass
class Fault:
    """What was found wrong, once for each instruction."""

    kind: str
    where: str
    first: str
    count: int

    def __str__(self) -> str:
        return f"{self.kind} ({self.count}x) in {self.where}; first: {self.first}"


@dataclass
class Faults:
    found: dict[tuple[str, str], Fault] = field(default_factory=dict)

    def add(self, kind: str, where: str, first: str, count: int = 1) -> None:
        self.found.setdefault((kind, where), Fault(kind, where, first, 0)).count += count

    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.found.values()}

    def __str__(self) -> str:
        return "\n".join(map(str, self.found.values()))


# -- global memory ----------------------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _touch(owner, place, size, align):
    if place < 0 or place + size > owner.size or owner[place] < 0 or owner[place + size - 1] != owner[place]:
        return OUTSIDE
    return MISALIGNED if place % align else 0


@numba.njit(cache=True)
def _load_global(arena, owner, writer, blocks, places, sizes, align, out, problem):
    bad = 0
    for i in range(places.size):
        place, size = places[i], sizes[i]
        problem[i] = _touch(owner, place, size, align) if size else 0
        for byte in range(out.shape[1]):
            out[i, byte] = 0
        if problem[i] == 0:
            for byte in range(size):
                out[i, byte] = arena[place + byte]
                if writer[place + byte] == -1:
                    problem[i] = UNWRITTEN
                elif writer[place + byte] >= 0 and writer[place + byte] != blocks[i]:
                    problem[i] = RACE
        bad += problem[i] != 0
    return bad


@numba.njit(cache=True)
def _store_global(arena, owner, writer, blocks, places, data, align, problem):
    bad, size = 0, data.shape[1]
    for i in range(places.size):
        place = places[i]
        problem[i] = _touch(owner, place, size, align)
        if problem[i] == 0:
            for byte in range(size):
                before = writer[place + byte]
                if before == -2:
                    problem[i] = READ_ONLY
                    continue
                if before >= 0 and (before != blocks[i] or arena[place + byte] != data[i, byte]):
                    problem[i] = REWRITTEN
                arena[place + byte], writer[place + byte] = data[i, byte], blocks[i]
        bad += problem[i] != 0
    return bad


class GlobalMemory:
    """The arguments of a kernel, with gaps between them. `writer`: -2 for inputs, -1 for nobody, else the block."""

    def __init__(self, inputs: list[np.ndarray], outputs: list[tuple[tuple[int, ...], np.dtype]]) -> None:
        self.outputs, self.input_count = outputs, len(inputs)
        self.sizes = [x.nbytes for x in inputs]
        self.sizes += [int(np.prod(shape)) * dtype.itemsize for shape, dtype in outputs]
        ends = np.cumsum([-(-(size + GAP) // 256) * 256 for size in self.sizes])
        self.starts = [GAP, *(GAP + int(end) for end in ends)][: len(self.sizes)]
        total = GAP + int(ends[-1])
        self.arena = np.full(total, POISON, np.uint8)
        self.owner, self.writer = np.full(total, -1, np.int16), np.full(total, -1, np.int32)
        for number, part in enumerate(map(self.part, range(len(self.sizes)))):
            self.owner[part] = number
            if number < len(inputs):
                self.arena[part] = np.frombuffer(np.ascontiguousarray(inputs[number]).tobytes(), np.uint8)
                self.writer[part] = -2

    def part(self, number: int) -> slice:
        return slice(self.starts[number], self.starts[number] + self.sizes[number])

    def address(self, number: int) -> int:
        """Of an argument. Beyond the arguments come pointers to scratch memory, of which these kernels want none."""
        return GLOBAL_BASE + self.starts[number] if number < len(self.starts) else 0

    def load(self, blocks, addresses, sizes, align: int, most: int, report: Report) -> np.ndarray:
        """`[threads, most]` bytes, zeros beyond the size that each thread asks for."""
        places = addresses - GLOBAL_BASE
        out, problem = np.empty((places.size, most), np.uint8), np.empty(places.size, np.uint8)
        if _load_global(self.arena, self.owner, self.writer, blocks, places, sizes, align, out, problem):
            report(problem, places)
        return out

    def store(self, blocks, addresses, data: np.ndarray, align: int, report: Report) -> None:
        places, problem = addresses - GLOBAL_BASE, np.empty(addresses.size, np.uint8)
        if _store_global(self.arena, self.owner, self.writer, blocks, places, data, align, problem):
            report(problem, places)

    def describe(self, place: int) -> str:
        number = max((n for n, start in enumerate(self.starts) if start - GAP // 2 <= place), default=0)
        return f"byte {place - self.starts[number]} of the {self.sizes[number]} of argument {number}"

    def results(self) -> list[np.ndarray]:
        parts = (self.part(number) for number in range(self.input_count, len(self.sizes)))
        return [self.arena[part].view(dtype).reshape(shape).copy() for part, (shape, dtype) in zip(parts, self.outputs)]

    def find_unwritten(self, faults: Faults) -> None:
        for number in range(self.input_count, len(self.sizes)):
            missing = int((self.writer[self.part(number)] == -1).sum())
            if missing:
                faults.add("output not written", f"argument {number}", f"{missing} of {self.sizes[number]} bytes")


# -- shared memory ----------------------------------------------------------------------------------------------------


@numba.njit(cache=True)
def _is_inside(place, count, size):
    return place >= 0 and place + count <= size


@numba.njit(cache=True)
def _read_shared(memory, size, base, places, align, stamps, shift, wrote, read, flying, out, problem):
    bad, count = 0, out.shape[1]
    for i in range(places.size):
        place, stamp = places[i], stamps[i]
        if not _is_inside(place, count, size):
            problem[i] = OUTSIDE
            out[i, :] = POISON
            bad += 1
            continue
        wrong = MISALIGNED if place % align else 0
        at, epoch = base[i] + place, stamp >> 6
        for byte in range(count):
            out[i, byte] = memory[at + byte]
        for granule in range(at >> shift, (at + count - 1 >> shift) + 1):
            if flying[granule]:
                wrong = IN_FLIGHT
            elif wrote[granule] == -1:
                wrong = UNWRITTEN
            elif wrote[granule] >> 6 == epoch and wrote[granule] != stamp:
                wrong = RACE
            if read[granule] >> 6 != epoch:
                read[granule] = stamp
            elif read[granule] != stamp:
                read[granule] = epoch << 6 | SEVERAL
        problem[i] = wrong
        bad += wrong != 0
    return bad


@numba.njit(cache=True)
def _claim(memory, at, stamp, shift, wrote, read, flying, in_use, data, copy):
    """What is wrong with writing these bytes now: by a store, which may repeat what is there, or by a copy, later."""
    wrong, epoch = 0, stamp >> 6
    for granule in range(at >> shift, (at + data.size - 1 >> shift) + 1):
        if flying[granule]:
            wrong = IN_FLIGHT
        if in_use[granule]:
            wrong = IN_USE
        if read[granule] >> 6 == epoch and read[granule] != stamp:
            wrong = RACE
        if wrote[granule] != -1 and wrote[granule] >> 6 == epoch and wrote[granule] != stamp:
            for byte in range(max(at, granule << shift), min(at + data.size, granule + 1 << shift)):
                if copy or memory[byte] != data[byte - at]:
                    wrong = RACE
    return wrong


@numba.njit(cache=True)
def _put(memory, at, stamp, shift, wrote, time, flying, data, tick):
    for byte in range(data.size):
        memory[at + byte] = data[byte]
    for granule in range(at >> shift, (at + data.size - 1 >> shift) + 1):
        flying[granule], wrote[granule], time[granule] = 0, stamp, tick


@numba.njit(cache=True)
def _store_shared(
    memory, size, base, places, align, stamps, shift, wrote, read, time, flying, in_use, data, tick, problem
):
    """One thread after the other; `tick` -1: they claim the place of a copy instead."""
    bad = 0
    for i in range(places.size):
        if not _is_inside(places[i], data.shape[1], size):
            problem[i] = OUTSIDE
        else:
            at, misaligned = base[i] + places[i], MISALIGNED if places[i] % align else 0
            wrong = _claim(memory, at, stamps[i], shift, wrote, read, flying, in_use, data[i], tick == -1)
            problem[i] = max(wrong, misaligned)
            if tick == -1:
                flying[at >> shift : (at + data.shape[1] - 1 >> shift) + 1] = 1
            else:
                _put(memory, at, stamps[i], shift, wrote, time, flying, data[i], tick)
        bad += problem[i] != 0
    return bad


@numba.njit(cache=True)
def _land_copies(memory, size, base, places, stamps, shift, wrote, time, flying, data, tick):
    for i in range(places.size):
        if _is_inside(places[i], data.shape[1], size):
            _put(memory, base[i] + places[i], stamps[i], shift, wrote, time, flying, data[i], tick)


@numba.njit(cache=True)
def _find_unfenced(size, base, places, count, shift, wrote, time, fences, fence_stamps, warps, warp, problem):
    """`warp`: of all that run, the first that reads; `fences`, `fence_stamps`: of each warp, when it did so last."""
    bad = 0
    for i in range(places.size):
        problem[i] = 0
        if _is_inside(places[i], count, size):
            at = base[i] + places[i]
            block = warp[i] // warps * warps
            for granule in range(at >> shift, (at + count - 1 >> shift) + 1):
                if wrote[granule] == -1:
                    continue
                by_writer = fences[block + (wrote[granule] & 63)] > time[granule]
                by_reader = fences[warp[i]] > time[granule] and fence_stamps[warp[i]] >> 6 > wrote[granule] >> 6
                if not (by_writer or by_reader):
                    problem[i] = UNFENCED
        bad += problem[i] != 0
    return bad


@numba.njit(cache=True)
def _use_shared(size, base, places, count, shift, in_use, change):
    for i in range(places.size):
        if _is_inside(places[i], count, size):
            at = base[i] + places[i]
            for granule in range(at >> shift, (at + count - 1 >> shift) + 1):
                in_use[granule] += change


class SharedMemory:
    """Of several blocks. Threads are numbered through all of them; `places` count from the start of their block's."""

    def __init__(self, size: int, blocks: int, threads: int, narrowest: int) -> None:
        self.size, self.threads = size, threads
        self.each = -(-max(size, 1) // 16) * 16
        self.shift = narrowest.bit_length() - 1
        granules = self.each * blocks >> self.shift
        self.memory = np.empty(self.each * blocks, np.uint8)
        self.wrote, self.read = np.empty(granules, np.int64), np.empty(granules, np.int64)  # stamps, of the last time
        self.time = np.empty(granules, np.int64)  # of the last write, in instructions
        self.flying, self.in_use = np.empty(granules, np.uint8), np.empty(granules, np.int16)
        lanes = np.arange(blocks * threads)
        self.base, self.warp = lanes // threads * self.each, lanes % threads // 32
        self.stamps = self.warp.copy()
        self.fences = np.empty(lanes.size // 32, np.int64)  # when a warp fenced last
        self.fence_stamps = np.empty(lanes.size // 32, np.int64)
        self.reset()

    def reset(self) -> None:
        """As other blocks find it."""
        self.memory[:], self.wrote[:], self.read[:], self.time[:] = POISON, -1, -1, -1
        self.flying[:], self.in_use[:], self.fences[:] = 0, 0, -1
        self.stamps[:] = self.warp

    def barrier(self, lanes: np.ndarray) -> None:
        self.stamps[lanes] += 64

    def fence(self, lanes: np.ndarray, tick: int) -> None:
        warps = lanes // 32
        self.fences[warps], self.fence_stamps[warps] = tick, self.stamps[lanes]

    def load(
        self, lanes: np.ndarray, places: np.ndarray, align: int, count: int, report: Report, together: bool = False
    ) -> np.ndarray:
        """`together`: all warps of a group read, not only those of `lanes`."""
        out, problem = np.empty((places.size, count), np.uint8), np.empty(places.size, np.uint8)
        stamps = self.stamps[lanes] | SEVERAL if together else self.stamps[lanes]
        if _read_shared(
            self.memory, self.size, self.base[lanes], places, align, stamps, self.shift, self.wrote, self.read,
            self.flying, out, problem,
        ):  # fmt: skip
            report(problem, places)
        return out

    def store(self, lanes, places: np.ndarray, data: np.ndarray, align: int, tick: int, report: Report) -> None:
        problem = np.empty(places.size, np.uint8)
        if _store_shared(
            self.memory, self.size, self.base[lanes], places, align, self.stamps[lanes], self.shift, self.wrote,
            self.read, self.time, self.flying, self.in_use, data, tick, problem,
        ):  # fmt: skip
            report(problem, places)

    def start_copies(self, lanes, places: np.ndarray, data: np.ndarray, report: Report) -> None:
        self.store(lanes, places, data, data.shape[1], -1, report)

    def land_copies(self, lanes, places: np.ndarray, data: np.ndarray, tick: int) -> None:
        _land_copies(
            self.memory, self.size, self.base[lanes], places, self.stamps[lanes], self.shift, self.wrote, self.time,
            self.flying, data, tick,
        )  # fmt: skip

    def start_product(self, lanes, places: np.ndarray, report: Report) -> None:
        """A wgmma may read 16 bytes at each place from now on."""
        self.load(lanes, places, 16, 16, report, together=True)
        problem = np.empty(places.size, np.uint8)
        if _find_unfenced(
            self.size, self.base[lanes], places, 16, self.shift, self.wrote, self.time, self.fences, self.fence_stamps,
             self.threads // 32, lanes // 32, problem,
        ):  # fmt: skip
            report(problem, places)
        _use_shared(self.size, self.base[lanes], places, 16, self.shift, self.in_use, 1)

    def finish_product(self, lanes, places: np.ndarray) -> np.ndarray:
        """The bytes, which it reads as late as this, and no later."""
        _use_shared(self.size, self.base[lanes], places, 16, self.shift, self.in_use, -1)
        return self.load(lanes, places, 16, 16, lambda problems, places: None, together=True)
