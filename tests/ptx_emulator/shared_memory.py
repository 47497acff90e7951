"""Shared memory, of each block, that forgives nothing.

What is read was written before. Two warps that touch the same bytes, one of them writing, without a barrier in between,
race. Copies in the background arrive when they are waited for, and until then their bytes belong to nobody. What a
wgmma may still read is not written. What threads have written passes a `fence.proxy.async` before a wgmma reads it: in
the thread that wrote it, or, after a barrier, in the one that multiplies.

A stamp is 64 times the barriers that a block has passed, plus the warp. Memory is watched in granules as large as the
narrowest access of the kernel.
"""

import numba
import numpy as np

from ptx_emulator.faults import IN_FLIGHT, IN_USE, MISALIGNED, OUTSIDE, RACE, UNFENCED, UNWRITTEN, Report
from ptx_emulator.global_memory import POISON

SHARED_BASE = 1024  # address of the first byte: descriptors need multiples of 1024, and 0 is nowhere
SEVERAL = 63  # instead of a warp
NEVER = -1
CLAIM = -1  # instead of a tick: a copy in the background, which writes later
PIECE = 16  # bytes that a wgmma reads at a place


@numba.njit(cache=True)
def _inside(place, count, size):
    return place >= 0 and place + count <= size


@numba.njit(cache=True)
def _granules(at, count, shift):
    return range(at >> shift, (at + count - 1 >> shift) + 1)


@numba.njit(cache=True)
def _read(memory, size, base, places, align, stamps, shift, wrote, read, flying, out, problem):
    bad = 0
    for i in range(places.size):
        place, stamp, count = places[i], stamps[i], out.shape[1]
        epoch, at, wrong = stamp >> 6, base[i] + place, 0
        if not _inside(place, count, size):
            out[i, :], wrong = POISON, OUTSIDE
        else:
            out[i, :] = memory[at : at + count]
            wrong = MISALIGNED if place % align else 0
            for granule in _granules(at, count, shift):
                author, reader = wrote[granule], read[granule]
                if flying[granule]:
                    wrong = IN_FLIGHT
                elif author == NEVER:
                    wrong = UNWRITTEN
                elif author >> 6 == epoch and author != stamp:
                    wrong = RACE
                if reader >> 6 != epoch:
                    read[granule] = stamp
                elif reader != stamp:
                    read[granule] = epoch << 6 | SEVERAL
        problem[i] = wrong
        bad += wrong != 0
    return bad


@numba.njit(cache=True)
def _conflict(memory, at, stamp, shift, wrote, read, flying, in_use, data, later):
    """What is wrong with writing these bytes now: by a store, which may repeat what is there, or by a copy, later."""
    wrong, epoch = 0, stamp >> 6
    for granule in _granules(at, data.size, shift):
        author, reader = wrote[granule], read[granule]
        if flying[granule]:
            wrong = IN_FLIGHT
        if in_use[granule]:
            wrong = IN_USE
        if reader >> 6 == epoch and reader != stamp:
            wrong = RACE
        if author != NEVER and author >> 6 == epoch and author != stamp:
            for byte in range(max(at, granule << shift), min(at + data.size, granule + 1 << shift)):
                if later or memory[byte] != data[byte - at]:
                    wrong = RACE
    return wrong


@numba.njit(cache=True)
def _put(memory, at, stamp, shift, wrote, time, flying, data, tick):
    memory[at : at + data.size] = data
    for granule in _granules(at, data.size, shift):
        wrote[granule], time[granule], flying[granule] = stamp, tick, 0


@numba.njit(cache=True)
def _write(memory, size, base, places, align, stamps, shift, wrote, read, time, flying, in_use, data, tick, problem):
    """One thread after the other."""
    bad, later = 0, tick == CLAIM
    for i in range(places.size):
        wrong = OUTSIDE
        if _inside(places[i], data.shape[1], size):
            at = base[i] + places[i]
            wrong = _conflict(memory, at, stamps[i], shift, wrote, read, flying, in_use, data[i], later)
            if wrong == 0 and places[i] % align:
                wrong = MISALIGNED
            if later:
                for granule in _granules(at, data.shape[1], shift):
                    flying[granule] = 1
            else:
                _put(memory, at, stamps[i], shift, wrote, time, flying, data[i], tick)
        problem[i] = wrong
        bad += wrong != 0
    return bad


@numba.njit(cache=True)
def _land(memory, size, base, places, stamps, shift, wrote, time, flying, data, tick):
    for i in range(places.size):
        if _inside(places[i], data.shape[1], size):
            _put(memory, base[i] + places[i], stamps[i], shift, wrote, time, flying, data[i], tick)


@numba.njit(cache=True)
def _find_unfenced(size, base, places, shift, wrote, time, fences, fence_stamps, warps, warp, problem):
    """`warp`: of all that run, the first that reads; `fences`, `fence_stamps`: of each warp, when it fenced last."""
    bad = 0
    problem[:] = 0
    for i in range(places.size):
        if _inside(places[i], PIECE, size):
            mine, first = warp[i], warp[i] // warps * warps  # first: of the block
            for granule in _granules(base[i] + places[i], PIECE, shift):
                author, when = wrote[granule], time[granule]
                by_writer = author != NEVER and fences[first + (author & 63)] > when
                by_reader = fences[mine] > when and fence_stamps[mine] >> 6 > author >> 6
                if author != NEVER and not by_writer and not by_reader:
                    problem[i] = UNFENCED
        bad += problem[i] != 0
    return bad


@numba.njit(cache=True)
def _use(size, base, places, shift, in_use, change):
    for i in range(places.size):
        if _inside(places[i], PIECE, size):
            for granule in _granules(base[i] + places[i], PIECE, shift):
                in_use[granule] += change


class SharedMemory:
    """Of several blocks. Threads are numbered through all of them; `places` count from the start of their block's."""

    def __init__(self, size: int, blocks: int, threads: int, narrowest: int) -> None:
        self.size, self.warps, self.shift = size, threads // 32, narrowest.bit_length() - 1
        each = max(16, -(-size // 16) * 16)
        numbers = lambda count, dtype: np.empty(count, dtype)
        granules = each * blocks >> self.shift
        self.memory = numbers(each * blocks, np.uint8)
        self.wrote, self.read = numbers(granules, np.int64), numbers(granules, np.int64)  # stamps, of the last time
        self.time = numbers(granules, np.int64)  # of the last write, in instructions
        self.flying, self.in_use = numbers(granules, np.uint8), numbers(granules, np.int16)
        self.fences, self.fence_stamps = (numbers(blocks * self.warps, np.int64) for _ in range(2))
        block, thread = np.divmod(np.arange(blocks * threads), threads)
        self.base, self.warp = block * each, thread // 32
        self.stamps = self.warp.copy()
        self.reset()

    def reset(self) -> None:
        """As other blocks find it."""
        self.memory[:] = POISON
        for never in (self.wrote, self.read, self.time, self.fences):
            never[:] = NEVER
        self.flying[:], self.in_use[:], self.stamps[:] = 0, 0, self.warp

    def barrier(self, lanes: np.ndarray) -> None:
        self.stamps[lanes] += 64

    def fence(self, lanes: np.ndarray, tick: int) -> None:
        self.fences[lanes // 32], self.fence_stamps[lanes // 32] = tick, self.stamps[lanes]

    def describe(self, place: int) -> str:
        return f"byte {place} of {self.size} in shared memory"

    def load(self, lanes, places, align: int, count: int, report: Report, by_group: bool = False) -> np.ndarray:
        """`by_group`: four warps read, not only those of `lanes`."""
        stamps = self.stamps[lanes] | SEVERAL if by_group else self.stamps[lanes]
        out, problem = np.empty((lanes.size, count), np.uint8), np.empty(lanes.size, np.uint8)
        state = self.wrote, self.read, self.flying
        if _read(self.memory, self.size, self.base[lanes], places, align, stamps, self.shift, *state, out, problem):
            report(problem, places)
        return out

    def store(self, lanes, places, data: np.ndarray, align: int, tick: int, report: Report) -> None:
        base, stamps, problem = self.base[lanes], self.stamps[lanes], np.empty(lanes.size, np.uint8)
        state = self.wrote, self.read, self.time, self.flying, self.in_use
        if _write(self.memory, self.size, base, places, align, stamps, self.shift, *state, data, tick, problem):
            report(problem, places)

    def start_copies(self, lanes, places, data: np.ndarray, report: Report) -> None:
        self.store(lanes, places, data, data.shape[1], CLAIM, report)

    def land_copies(self, lanes, places, data: np.ndarray, tick: int) -> None:
        state = self.wrote, self.time, self.flying
        _land(self.memory, self.size, self.base[lanes], places, self.stamps[lanes], self.shift, *state, data, tick)

    def start_product(self, lanes, places, report: Report) -> None:
        """A wgmma may read 16 bytes at each place from now on."""
        self.load(lanes, places, PIECE, PIECE, report, by_group=True)
        base, problem = self.base[lanes], np.empty(lanes.size, np.uint8)
        state = self.wrote, self.time, self.fences, self.fence_stamps
        if _find_unfenced(self.size, base, places, self.shift, *state, self.warps, lanes // 32, problem):
            report(problem, places)
        _use(self.size, base, places, self.shift, self.in_use, 1)

    def finish_product(self, lanes, places) -> np.ndarray:
        """The bytes, which it reads as late as this, and no later."""
        _use(self.size, self.base[lanes], places, self.shift, self.in_use, -1)
        return self.load(lanes, places, PIECE, PIECE, lambda problems, places: None, by_group=True)
