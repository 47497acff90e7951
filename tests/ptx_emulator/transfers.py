"""Loads and stores, and copies in the background (cp.async)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.formats import KINDS, Array
from ptx_emulator.parser import Address, Instruction, Literal, Name, Operand, PtxError, Register, Vector

if TYPE_CHECKING:
    from ptx_emulator.machine import Machine, Step, Where


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _load(machine: Machine, instruction: Instruction) -> Step:
    kind, space = instruction.words[-1], instruction.space()
    into, source, *policy = instruction.operands
    if space == "param":
        return _load_parameter(machine, into, source, kind)
    if space is None or not all(isinstance(x, Register) for x in policy):
        raise PtxError("memory of another kind")
    writers, place = [machine.writer(part, kind) for part in _parts(into)], machine.address(source, space)
    width = KINDS[kind].itemsize * len(writers)

    def step(where: Where) -> None:
        lanes = machine.lanes_of(where)
        report, places = machine.report(instruction, lanes, space), place(lanes)
        if space == "shared":
            data = machine.shared.load(lanes, places, width, width, report)
        else:
            sizes = np.full(lanes.size, width)
            data = machine.memory.load(machine.block[lanes], places, sizes, width, width, report)
        numbers: Array = data.view(KINDS[kind])
        if where is not True:  # writers choose among one for each thread
            every = np.empty((machine.every.size, len(writers)), KINDS[kind])
            every[lanes] = numbers
            numbers = every
        for number, write in enumerate(writers):
            write(numbers[:, number], where)

    return step


def _load_parameter(machine: Machine, into: Operand, source: Operand, kind: str) -> Step:
    match source:
        case Address(Name(text), 0):
            pointer = machine.memory.address(machine.kernel.parameters.index(text))
        case _:
            raise PtxError("parts of parameters")
    write = machine.writer(into, kind)
    return lambda where: write(np.uint64(pointer), where)


def _store(machine: Machine, instruction: Instruction) -> Step:
    kind, space = instruction.words[-1], instruction.space()
    into, source = instruction.operands
    if instruction.has("async") or space not in ("global", "shared"):
        raise PtxError("memory of another kind")
    values, place = [machine.full(part, kind) for part in _parts(source)], machine.address(into, space)

    def step(where: Where) -> None:
        lanes = machine.lanes_of(where)
        report, places = machine.report(instruction, lanes, space), place(lanes)
        data = np.column_stack([x[lanes] for x in values]).view(np.uint8)
        if space == "shared":
            machine.shared.store(lanes, places, data, data.shape[1], machine.tick, report)
        else:
            machine.memory.store(machine.block[lanes], places, data, data.shape[1], report)

    return step


# -- cp.async ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Copies:
    """Of several threads: each has read its bytes and has claimed a place for them."""

    machine: Machine
    lanes: np.ndarray
    places: np.ndarray
    data: np.ndarray
    group: np.ndarray

    def part(self, chosen: np.ndarray) -> Copies:
        cut = {name: getattr(self, name)[chosen] for name in ("lanes", "places", "data", "group")}
        return replace(self, **cut)

    def finish(self) -> None:
        self.machine.shared.land_copies(self.lanes, self.places, self.data, self.machine.tick)


def _copy(machine: Machine, instruction: Instruction) -> Step:
    """Writes as many bytes as the third operand says; reads as many as the fourth, and fills up with zeros."""
    if instruction.words[1] != "async" or instruction.has("bulk", "mbarrier", "wait_all"):
        raise PtxError("copies by TMA, and those that a mbarrier awaits")
    grouping = machine.copies.bind(instruction)
    if grouping is not None:
        return grouping
    into, source, width, *more = instruction.operands
    if not isinstance(width, Literal) or len(more) > 1:
        raise PtxError("operands of a copy")
    size = width.integer()
    place, address = machine.address(into, "shared"), machine.address(source, "global")
    existing = machine.full(more[0], "u32") if more else np.full(machine.every.size, size)

    def step(where: Where) -> None:
        lanes = machine.lanes_of(where)
        sizes, places = existing[lanes].astype(np.int64), place(lanes)
        if (sizes > size).any():
            raise PtxError(f"reads more than it writes: {instruction}")
        report = machine.report(instruction, lanes, "global")
        data = machine.memory.load(machine.block[lanes], address(lanes), sizes, size, size, report)
        machine.shared.start_copies(lanes, places, data, machine.report(instruction, lanes, "shared"))
        machine.copies.running.append(Copies(machine, lanes, places, data, machine.copies.closed[lanes]))

    return step


BINDERS = {"ld": _load, "st": _store, "cp": _copy}
