"""Jumps, barriers, moves, and what the threads of a warp tell each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.formats import KINDS
from ptx_emulator.parser import Instruction, Literal, Name, Operand, Pair, PtxError, Vector

if TYPE_CHECKING:
    from ptx_emulator.machine import Machine, Step, Where

WARP = 32


def _jump(machine: Machine, instruction: Instruction) -> Step:
    (label,) = instruction.operands
    if not isinstance(label, Name):
        raise PtxError("jumps to where a register says")
    target = machine.kernel.labels[label.text]
    return lambda where: machine.jump(where, target)


def _end(machine: Machine, instruction: Instruction) -> Step:
    return machine.end


def _barrier(machine: Machine, instruction: Instruction) -> Step:
    if instruction.has("warp"):  # its threads are in step anyway

        def check(where: Where) -> None:
            machine.check_whole(where, WARP, instruction)

        return check
    if not instruction.has("sync") or instruction.operands != (Literal("0"),):
        raise PtxError("barriers other than bar.sync 0 of the whole block")
    return machine.arrive


def _nothing(machine: Machine, instruction: Instruction) -> Step:
    """What orders a kernel after the one before."""
    return lambda where: None


# -- moves ------------------------------------------------------------------------------------------------------------


def _move(machine: Machine, instruction: Instruction) -> Step:
    """Also of several registers into a wider one, the first the lowest, and back."""
    into, source = instruction.operands
    kind = instruction.words[-1]
    if isinstance(source, Vector):
        return _join(machine, source.parts, into, kind)
    if isinstance(into, Vector):
        return _split(machine, source, into.parts, kind)
    write, value = machine.writer(into, kind), machine.read(source, kind)
    return lambda where: write(value, where)


def _join(machine: Machine, parts: tuple[Operand, ...], into: Operand, kind: str) -> Step:
    dtype = KINDS[kind]
    values = [machine.full(part, f"b{8 * dtype.itemsize // len(parts)}") for part in parts]
    write = machine.writer(into, kind)
    return lambda where: write(np.column_stack(values).view(dtype)[:, 0], where)


def _split(machine: Machine, source: Operand, parts: tuple[Operand, ...], kind: str) -> Step:
    size = KINDS[kind].itemsize // len(parts)
    value, writers = machine.full(source, kind), [machine.writer(part, f"b{8 * size}") for part in parts]

    def step(where: Where) -> None:
        pieces = value.copy().view(f"u{size}").reshape(-1, len(writers))  # a copy: the source may be among the parts
        for number, write in enumerate(writers):
            write(pieces[:, number], where)

    return step


def _to_global(machine: Machine, instruction: Instruction) -> Step:
    if instruction.words != ("cvta", "to", "global", "u64"):
        raise PtxError("generic addresses of other memory")
    return _move(machine, instruction)  # those of global memory are its own


# -- between the threads of a warp ------------------------------------------------------------------------------------


def _shuffle(machine: Machine, instruction: Instruction) -> Step:
    """Each thread reads a register of another one of its segment of the warp; beyond the segment, its own."""
    into, source, distance, limits, members = instruction.operands
    if not (isinstance(members, Literal) and members.integer() in (-1, 0xFFFFFFFF)):
        raise PtxError("shuffles of a part of a warp")
    result, flag = (into.first, into.second) if isinstance(into, Pair) else (into, Name("_"))
    write, write_flag = machine.writer(result, "b32"), machine.writer(flag, "pred")
    value, by, packed = machine.full(source, "b32"), machine.read(distance, "b32"), machine.read(limits, "b32")
    mode, lane = instruction.words[2], machine.every % WARP

    def step(where: Where) -> None:
        machine.check_whole(where, WARP, instruction)
        far, bound, segment = (np.asarray(x, np.int64) & 31 for x in (by, packed, packed >> np.uint32(8)))
        start = lane & segment
        last = start | (bound & ~segment)
        if mode == "up":
            other = lane - far
            inside = other >= last
        else:
            other = {"down": lane + far, "bfly": lane ^ far, "idx": start | (far & ~segment)}[mode]
            inside = other <= last
        write(value[machine.every - lane + np.where(inside, other, lane)], where)
        write_flag(inside, where)

    return step


BINDERS = {
    "bra": _jump, "ret": _end, "exit": _end, "bar": _barrier, "griddepcontrol": _nothing,
    "mov": _move, "cvta": _to_global, "shfl": _shuffle,
}  # fmt: skip
