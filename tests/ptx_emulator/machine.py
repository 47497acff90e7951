"""Runs many thread blocks in step: a register is an array with an entry for each thread, an instruction a numpy call.

Each thread has a program counter. Of the threads that can go on, those furthest behind go next, so that threads that
took different branches meet again. `bar.sync` holds a thread until all others of its block have arrived or ended.

An instruction is bound once, to a function of the threads that take part: `True` for all, or an array of booleans.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator import arithmetic, tensor_cores, transfers
from ptx_emulator.arithmetic import KINDS, Array
from ptx_emulator.memory import MEANINGS, SHARED_BASE, Faults, GlobalMemory, Report, SharedMemory
from ptx_emulator.parser import (
    Address,
    Instruction,
    Kernel,
    Literal,
    Name,
    Negated,
    Operand,
    Pair,
    PtxError,
    Register,
    Vector,
)

Where = Any  # True, or a boolean for each thread
Step = Callable[[Where], None]
Block = tuple[int, int, int]
PREDICATE = np.dtype(bool)


class Machine:
    """Attributes that the modules of instructions use:

    lanes: threads of all blocks that run together, numbered through; the first `threads` are those of one block.
    tick: instructions that have run.
    copies, products: what is on its way, see `transfers` and `tensor_cores`; `*_group` counts, for each thread, the
      groups that it has closed.
    """

    def __init__(
        self, kernel: Kernel, grid: Block, shared_bytes: int, memory: GlobalMemory, faults: Faults, together: int
    ) -> None:
        self.kernel, self.grid, self.memory, self.faults = kernel, grid, memory, faults
        self.threads, self.lanes = kernel.threads, together * kernel.threads
        self.every = np.arange(self.lanes)
        self.symbols, size = _lay_out(kernel, shared_bytes)
        self.shared = SharedMemory(size, together, self.threads, _narrowest(kernel))
        self.registers: dict[Register, np.ndarray] = {}
        self.counter = np.zeros(self.lanes, np.int64)
        self.waiting, self.ended = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
        self.block = np.zeros(self.lanes, np.int32)  # which of the grid, for each thread
        self.place = np.zeros((3, self.lanes), np.uint32)  # %ctaid
        self.copies: list[transfers.Copies] = []
        self.products: list[tensor_cores.Product] = []
        self.copy_group, self.product_group = np.zeros(self.lanes, np.int64), np.zeros(self.lanes, np.int64)
        self.tick = 0
        self.ends = _straight_lines(kernel)
        self.bound: dict[int, list[Step]] = {}

    # -- control ------------------------------------------------------------------------------------------------------

    def run(self, first: int, blocks: list[Block]) -> None:
        """`first` is the number of the first block. Fewer blocks than fit leave the other threads ended."""
        count = len(blocks) * self.threads
        self.shared.reset()
        self.copies.clear()
        self.products.clear()
        self.counter[:], self.waiting[:], self.ended[:] = 0, False, self.every >= count
        self.block[:] = first + self.every // self.threads
        self.place[:, :count] = np.repeat(np.array(blocks, np.uint32).T, self.threads, axis=1)
        for array in self.registers.values():
            array.view(np.uint8)[:] = 0 if array.dtype == PREDICATE else 0xA5  # whoever reads it unwritten will notice
        while not self.ended.all():
            self._advance()

    def _advance(self) -> None:
        """One piece of straight code, for the threads furthest behind."""
        ready = ~(self.waiting | self.ended)
        if not ready.any():
            raise PtxError(f"{self.kernel.name}: threads wait at a barrier for others of their block, which have ended")
        start = int(self.counter[ready].min())
        active = ready & (self.counter == start)
        if start not in self.bound:
            if start not in self.ends:
                raise PtxError(f"{self.kernel.name}: a thread ran past the end")
            self.bound[start] = [self._bind(i) for i in self.kernel.instructions[start : self.ends[start]]]
        self.counter[active] = self.ends[start]  # which a branch, the last of its piece, changes
        where: Where = True if active.all() else active
        for step in self.bound[start]:
            step(where)
            self.tick += 1

    def arrive(self, where: Where) -> None:
        """At a barrier."""
        self.waiting[self.select(where)] = True
        self._release()

    def end(self, where: Where) -> None:
        self.ended[self.select(where)] = True
        self._release()

    def _release(self) -> None:
        waiting = self.waiting.reshape(-1, self.threads)
        complete = (waiting | self.ended.reshape(waiting.shape)).all(axis=1) & waiting.any(axis=1)
        if complete.any():
            lanes = np.flatnonzero(np.repeat(complete, self.threads) & self.waiting)
            self.waiting[lanes] = False
            self.shared.barrier(lanes)

    def select(self, where: Where) -> Any:
        return slice(None) if where is True else where

    def lanes_of(self, where: Where) -> np.ndarray:
        return self.every if where is True else np.flatnonzero(where)

    def units_of(self, where: Where, size: int, instruction: Instruction) -> np.ndarray:
        """Warps (32) or groups of four (128) that take part, as the instruction wants: whole."""
        if where is True:
            return self.every[: self.lanes // size]
        some = where.reshape(-1, size)
        if (some.any(axis=1) != some.all(axis=1)).any():
            raise PtxError(f"{self.kernel.name}: not all of {size} threads take part in {instruction}")
        return np.flatnonzero(some[:, 0])

    # -- operands -----------------------------------------------------------------------------------------------------

    def register(self, register: Register) -> np.ndarray:
        if register not in self.registers:
            dtype = np.dtype(bool if register.bits == 1 else f"u{register.bits // 8}")
            array = self.registers[register] = np.empty(self.lanes, dtype)
            array.view(np.uint8)[:] = 0 if dtype == PREDICATE else 0xA5
        return self.registers[register]

    def read(self, operand: Operand, kind: str) -> Array:
        """A view that always shows the operand's value as this type, or a number."""
        dtype = KINDS[kind]
        if isinstance(operand, Register):
            array = self.register(operand)
            if PREDICATE in (dtype, array.dtype) or array.itemsize < dtype.itemsize:
                if dtype != array.dtype:
                    raise PtxError(f"{operand.name} as {kind}")
                return array
            return array.view(dtype)[:: array.itemsize // dtype.itemsize]
        if isinstance(operand, Literal):
            return number(operand.text, dtype)
        if isinstance(operand, Name):
            if operand.text in self.symbols:
                return dtype.type(self.symbols[operand.text])
            special = self._special(operand.text)
            return special if special.dtype == dtype else special.astype(dtype)
        raise PtxError(f"operand {operand}")

    def full(self, operand: Operand, kind: str) -> np.ndarray:
        """The same, an array in any case."""
        value = self.read(operand, kind)
        return value if isinstance(value, np.ndarray) else np.full(self.lanes, value)

    def _special(self, name: str) -> np.ndarray:
        register, _, axis = name.partition(".")
        number, thread = "xyz".find(axis or "x"), (self.every % self.threads).astype(np.uint32)
        if register == "%tid":
            return thread if axis == "x" else np.zeros_like(thread)
        if register == "%ctaid":
            return self.place[number]
        if register == "%ntid":
            return np.full_like(thread, self.threads if axis == "x" else 1)
        if register == "%nctaid":
            return np.full_like(thread, self.grid[number])
        if register in ("%laneid", "%warpid"):
            return thread % 32 if register == "%laneid" else thread // 32
        raise PtxError(f"special register {name}")

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """A view of a register to write to; one wider than `kind` is wanted as the extended number."""
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} is no register")
        array, dtype = self.register(operand), KINDS[kind]
        if PREDICATE in (dtype, array.dtype) or array.itemsize == dtype.itemsize:
            return array.view(dtype)
        if array.itemsize < dtype.itemsize or dtype.kind == "f":
            raise PtxError(f"{operand.name} does not fit {kind}")
        return array.view(f"{dtype.kind}{array.itemsize}")

    def writer(self, operand: Operand, kind: str) -> Callable[[Array, Where], None]:
        if operand == Name("_"):
            return lambda value, where: None
        target = self.target(operand, kind)

        def write(value: Array, where: Where) -> None:
            if where is True:
                target[...] = value
            else:
                np.copyto(target, value, where=where)

        return write

    def address(self, operand: Operand, space: str) -> Callable[[np.ndarray], np.ndarray]:
        """Of some threads; in shared memory counted from its start."""
        if not isinstance(operand, Address):
            raise PtxError(f"{operand} is no address")
        offset = operand.offset - (SHARED_BASE if space == "shared" else 0)
        if isinstance(operand.base, Name):
            fixed = self.symbols[operand.base.text] + offset
            return lambda lanes: np.full(lanes.size, fixed, np.int64)
        base = self.register(operand.base)
        return lambda lanes: base[lanes].astype(np.int64) + offset

    def report(self, instruction: Instruction, lanes: np.ndarray, space: str) -> Report:
        """Notes what is wrong with an access, once for each kind."""

        def note(problems: np.ndarray, places: np.ndarray) -> None:
            for code in np.unique(problems[problems != 0]):
                wrong = np.flatnonzero(problems == code)
                lane, place = lanes[wrong[0]], int(places[wrong[0]])
                where = f"byte {place} of {self.shared.size} in shared memory"
                where = where if space == "shared" else self.memory.describe(place)
                first = f"{where}, block {self.place[:, lane].tolist()}, thread {lane % self.threads}"
                self.faults.add(MEANINGS[int(code)], str(instruction), first, len(wrong))

        return note

    # -- instructions -------------------------------------------------------------------------------------------------

    def _bind(self, instruction: Instruction) -> Step:
        try:
            step = self._bind_unguarded(instruction)
        except (PtxError, KeyError, IndexError, ValueError, TypeError) as error:
            message = f"{self.kernel.name}: not modelled: {instruction} ({type(error).__name__}: {error})"
            raise PtxError(message) from error
        if instruction.guard is None:
            return step
        negated = isinstance(instruction.guard, Negated)
        flags = self.register(instruction.guard.register if negated else instruction.guard)  # type: ignore[union-attr, arg-type]

        def guarded(where: Where) -> None:
            chosen = ~flags & where if negated else flags & where
            if chosen.all():
                step(True)
            elif chosen.any():
                step(chosen)

        return guarded

    def _bind_unguarded(self, instruction: Instruction) -> Step:
        operation = arithmetic.operation(instruction)
        if operation is not None:
            return self._bind_operation(instruction, operation)
        for binders in (_BINDERS, transfers.BINDERS, tensor_cores.BINDERS):
            if instruction.words[0] in binders:
                return binders[instruction.words[0]](self, instruction)
        raise PtxError("unknown")

    def _bind_operation(self, instruction: Instruction, operation: arithmetic.Operation) -> Step:
        to, *origins = instruction.operands
        if len(origins) != len(operation.sources):
            raise PtxError(f"{len(origins)} operands instead of {len(operation.sources)}")
        sources = [self.read(origin, kind) for origin, kind in zip(origins, operation.sources)]
        function = operation.function
        if isinstance(function, np.ufunc) and isinstance(to, Register):
            target = self.target(to, operation.result)
            if target.dtype == KINDS[operation.result] and any(isinstance(x, np.ndarray) for x in sources):
                return lambda where: function(*sources, out=target, where=where)
        write = self.writer(to, operation.result)
        return lambda where: write(function(*sources), where)


def _lay_out(kernel: Kernel, dynamic: int) -> tuple[dict[str, int], int]:
    """Addresses of the arrays in shared memory, the one that the launch sizes last, and the bytes of all."""
    addresses, end = {}, 0
    for name, size in sorted(kernel.shared.items(), key=lambda item: item[1] is None):
        addresses[name] = SHARED_BASE + end
        end += dynamic if size is None else -(-size // 1024) * 1024
    return addresses, end


def _narrowest(kernel: Kernel) -> int:
    """Bytes of the smallest access to shared memory, at most 4."""
    touching = [i for i in kernel.instructions if i.words[0] in ("ld", "st") and i.has("shared")]
    return min([4, *(KINDS[i.words[-1]].itemsize for i in touching)])


def _straight_lines(kernel: Kernel) -> dict[int, int]:
    """Where code that runs without a jump begins, and where it ends."""
    jumps = ("bra", "ret", "exit", "bar", "barrier")
    after = {number + 1 for number, i in enumerate(kernel.instructions) if i.words[0] in jumps}
    cuts = sorted({0, len(kernel.instructions), *kernel.labels.values(), *after})
    return dict(itertools.pairwise(cuts))


def number(text: str, dtype: np.dtype) -> Any:
    """A literal as a number of this type; an integer in an untyped move may be the bits of a float."""
    bits = 8 * max(dtype.itemsize, 1)
    if text[:2] in ("0f", "0F", "0d", "0D"):
        value = np.array([int(text[2:], 16)], "u4" if text[1] in "fF" else "u8")
        if value.itemsize != dtype.itemsize:
            raise PtxError(f"{text} as {dtype}")
    else:
        integer = int(text.rstrip("U"), 0)
        if dtype == PREDICATE:
            return np.bool_(integer)
        value = np.array([integer & (1 << bits) - 1], f"u{dtype.itemsize}")
    return value.view(dtype)[0]


# -- control flow -----------------------------------------------------------------------------------------------------


def _branch(machine: Machine, instruction: Instruction) -> Step:
    (label,) = instruction.operands
    target = machine.kernel.labels[label.text] if isinstance(label, Name) else -1

    def step(where: Where) -> None:
        machine.counter[machine.select(where)] = target

    return step


def _end(machine: Machine, instruction: Instruction) -> Step:
    return machine.end


def _barrier(machine: Machine, instruction: Instruction) -> Step:
    if instruction.has("warp"):  # its threads are in step

        def check(where: Where) -> None:
            machine.units_of(where, 32, instruction)

        return check
    if not instruction.has("sync") or instruction.operands != (Literal("0"),):
        raise PtxError("barriers other than bar.sync 0 of the whole block")
    return machine.arrive


def _in_order_anyway(machine: Machine, instruction: Instruction) -> Step:
    return lambda where: None


# -- moves ------------------------------------------------------------------------------------------------------------


def _move(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.words[-1]
    to, origin = instruction.operands
    if isinstance(origin, Vector):
        return _pack(machine, to, origin, kind)
    if isinstance(to, Vector):
        return _unpack(machine, to, origin, kind)
    write, value = machine.writer(to, kind), machine.read(origin, kind)
    return lambda where: write(value, where)


def _pack(machine: Machine, to: Operand, origin: Vector, kind: str) -> Step:
    """The first is the lowest."""
    bits = 8 * KINDS[kind].itemsize // len(origin.parts)
    parts = [machine.full(part, f"b{bits}") for part in origin.parts]
    write, dtype = machine.writer(to, kind), KINDS[kind]
    return lambda where: write(np.stack(parts, axis=1).view(dtype)[:, 0], where)


def _unpack(machine: Machine, to: Vector, origin: Operand, kind: str) -> Step:
    size = KINDS[kind].itemsize // len(to.parts)
    writers = [machine.writer(part, f"b{8 * size}") for part in to.parts]
    value = machine.full(origin, kind)

    def step(where: Where) -> None:
        parts = value.copy().view(f"u{size}").reshape(-1, len(writers))  # a part may be the origin
        for number, write in enumerate(writers):
            write(parts[:, number], where)

    return step


def _to_global(machine: Machine, instruction: Instruction) -> Step:
    """Generic addresses of global memory are its own."""
    if not instruction.has("global"):
        raise PtxError("generic addresses of other memory")
    write, value = machine.writer(instruction.operands[0], "u64"), machine.read(instruction.operands[1], "u64")
    return lambda where: write(value, where)


# -- between the threads of a warp ------------------------------------------------------------------------------------


def _shuffle(machine: Machine, instruction: Instruction) -> Step:
    mode = instruction.words[2]
    to, origin, distance, limit, members = instruction.operands
    if not isinstance(members, Literal) or members.integer() not in (-1, 0xFFFFFFFF):
        raise PtxError("shuffles of a part of a warp")
    result, flag = (to.first, to.second) if isinstance(to, Pair) else (to, Name("_"))
    write, write_flag, value = machine.writer(result, "b32"), machine.writer(flag, "pred"), machine.full(origin, "b32")
    other, clamp = machine.read(distance, "u32"), machine.read(limit, "u32")
    lane = machine.every % 32

    def step(where: Where) -> None:
        machine.units_of(where, 32, instruction)
        by, segments = np.asarray(other, np.int64) & 31, np.asarray(clamp, np.int64) >> 8 & 31
        bound = np.asarray(clamp, np.int64) & 31
        last = (lane & segments) | (bound & ~segments)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": (lane & segments) | (by & ~segments)}
        found = source[mode] >= last if mode == "up" else source[mode] <= last
        write(value[machine.every - lane + np.where(found, source[mode], lane)], where)
        write_flag(found, where)

    return step


def _vote(machine: Machine, instruction: Instruction) -> Step:
    mode = instruction.one_of("any", "all", "ballot")
    to, flag, _ = instruction.operands
    if mode is None:
        raise PtxError("votes of another kind")
    negated = isinstance(flag, Negated)
    flags = machine.full(flag.register if isinstance(flag, Negated) else flag, "pred")
    write = machine.writer(to, "b32" if mode == "ballot" else "pred")

    def step(where: Where) -> None:
        machine.units_of(where, 32, instruction)
        warps = (flags ^ negated).reshape(-1, 32)
        if mode == "ballot":
            found: Array = np.packbits(warps, axis=1, bitorder="little").view(np.uint32)[:, 0]
        else:
            found = warps.any(axis=1) if mode == "any" else warps.all(axis=1)
        write(np.repeat(found, 32), where)

    return step


_BINDERS: dict[str, Callable[[Machine, Instruction], Step]] = {
    "bra": _branch, "ret": _end, "exit": _end, "bar": _barrier, "barrier": _barrier, "mov": _move,
    "cvta": _to_global, "shfl": _shuffle, "vote": _vote,
    "griddepcontrol": _in_order_anyway, "prefetch": _in_order_anyway, "membar": _in_order_anyway,
}  # fmt: skip
