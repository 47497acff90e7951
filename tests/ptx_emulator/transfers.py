"""Loads, stores, and copies in the background (cp.async), which arrive when they are waited for, not before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.arithmetic import KINDS, Array
from ptx_emulator.parser import Address, Instruction, Literal, Name, Operand, PtxError, Register, Vector

if TYPE_CHECKING:
    from ptx_emulator.machine import Machine, Step, Where


@dataclass(frozen=True)
class Copies:
    """Of some threads: each has read its bytes, has claimed a place, and belongs to a group of its thread."""

    lanes: np.ndarray
    places: np.ndarray
    data: np.ndarray
    group: np.ndarray

    def part(self, chosen: np.ndarray) -> Copies:
        return Copies(self.lanes[chosen], self.places[chosen], self.data[chosen], self.group[chosen])


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _load(machine: Machine, instruction: Instruction) -> Step:
    kind, space = instruction.words[-1], instruction.space()
    to, origin, *policy = instruction.operands
    if space == "param":
        return _load_parameter(machine, to, origin, kind)
    if space is None or not all(isinstance(x, Register) for x in policy):
        raise PtxError("memory of another kind")
    width, count = KINDS[kind].itemsize, len(_parts(to))
    writers, place = [machine.writer(part, kind) for part in _parts(to)], machine.address(origin, space)

    def step(where: Where) -> None:
        lanes = machine.lanes_of(where)
        report, places = machine.report(instruction, lanes, space), place(lanes)
        if space == "shared":
            data = machine.shared.load(lanes, places, width * count, width * count, report)
        else:
            sizes = np.full(lanes.size, width * count)
            data = machine.memory.load(machine.block[lanes], places, sizes, width * count, width * count, report)
        numbers: Array = data.view(KINDS[kind])
        if where is not True:  # one for each thread, for writers that choose
            spread = np.empty((machine.lanes, count), KINDS[kind])
            spread[lanes] = numbers
            numbers = spread
        for number, write in enumerate(writers):
            write(numbers[:, number], where)

    return step


def _load_parameter(machine: Machine, to: Operand, origin: Operand, kind: str) -> Step:
    if not (isinstance(origin, Address) and isinstance(origin.base, Name) and origin.offset == 0):
        raise PtxError("parts of parameters")
    value = np.uint64(machine.memory.address(machine.kernel.parameters.index(origin.base.text)))
    write = machine.writer(to, kind)
    return lambda where: write(value, where)


def _store(machine: Machine, instruction: Instruction) -> Step:
    kind, space = instruction.words[-1], instruction.space()
    to, origin = instruction.operands
    if space not in ("global", "shared"):
        raise PtxError("memory of another kind")
    parts, place = [machine.full(part, kind) for part in _parts(origin)], machine.address(to, space)

    def step(where: Where) -> None:
        lanes = machine.lanes_of(where)
        report, places = machine.report(instruction, lanes, space), place(lanes)
        data = np.stack([part[lanes] for part in parts], axis=1).view(np.uint8)
        if space == "shared":
            machine.shared.store(lanes, places, data, data.shape[1], machine.tick, report)
        else:
            machine.memory.store(machine.block[lanes], places, data, data.shape[1], report)

    return step


def _copy(machine: Machine, instruction: Instruction) -> Step:
    if instruction.words[1] != "async" or instruction.has("bulk", "mbarrier"):
        raise PtxError("copies by TMA, and copies that a mbarrier awaits")
    if instruction.has("commit_group"):

        def close(where: Where) -> None:
            machine.copy_group[machine.select(where)] += 1

        return close
    if instruction.has("wait_group", "wait_all"):
        left = instruction.operands[0] if instruction.operands else None
        running = left.integer() if isinstance(left, Literal) else 0
        return lambda where: _await(machine, where, running, open_too=left is None)
    return _start_copy(machine, instruction)


def _start_copy(machine: Machine, instruction: Instruction) -> Step:
    """Writes as many bytes as the third operand says; reads as many as the fourth, and fills up with zeros."""
    to, origin, width, *more = instruction.operands
    if not isinstance(width, Literal) or len(more) > 1:
        raise PtxError("operands of a copy")
    size = width.integer()
    place, address = machine.address(to, "shared"), machine.address(origin, "global")
    existing = machine.full(more[0], "u32") if more else np.full(machine.lanes, size)

    def step(where: Where) -> None:
        lanes = machine.lanes_of(where)
        sizes, places = existing[lanes].astype(np.int64), place(lanes)
        if (sizes > size).any():
            raise PtxError(f"reads more than it writes: {instruction}")
        report = machine.report(instruction, lanes, "global")
        data = machine.memory.load(machine.block[lanes], address(lanes), sizes, size, size, report)
        machine.shared.start_copies(lanes, places, data, machine.report(instruction, lanes, "shared"))
        machine.copies.append(Copies(lanes, places, data, machine.copy_group[lanes]))

    return step


def _await(machine: Machine, where: Where, running: int, open_too: bool) -> None:
    """All groups of these threads but the last `running` that they have closed; the one still open waits for more."""
    remaining = []
    for copies in machine.copies:
        done = copies.group < machine.copy_group[copies.lanes] - running
        done |= open_too
        if where is not True:
            done &= where[copies.lanes]
        if done.any():
            landed = copies.part(done)
            machine.shared.land_copies(landed.lanes, landed.places, landed.data, machine.tick)
        if not done.all():
            remaining.append(copies.part(~done))
    machine.copies[:] = remaining


BINDERS = {"ld": _load, "st": _store, "cp": _copy}
