"""Runs many thread blocks in step: a register is an array with an entry for each thread, an instruction a numpy call.

Each thread has a program counter. Of the threads that can go on, those furthest behind go next, so that threads that
took different branches meet again. `bar.sync` holds a thread until all others of its block have arrived or ended.

An instruction is bound once, to a function of the threads that take part: `True` for all, or an array of booleans.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator import arithmetic, bits, control, conversions, matrices, transfers, wgmma
from ptx_emulator.arithmetic import Operation
from ptx_emulator.background import Queue
from ptx_emulator.faults import MEANINGS, Faults, Report
from ptx_emulator.formats import KINDS, Array, number
from ptx_emulator.global_memory import GlobalMemory
from ptx_emulator.parser import Address, Instruction, Kernel, Literal, Name, Negated, Operand, PtxError, Register
from ptx_emulator.shared_memory import SHARED_BASE, SharedMemory

Where = Any  # True, or a boolean for each thread
Step = Callable[[Where], None]
Block = tuple[int, int, int]
PREDICATE = KINDS["pred"]
UNWRITTEN = 0xA5  # in each byte of a register: whoever reads it will notice

OPERATIONS = arithmetic.MAKERS | bits.MAKERS | conversions.MAKERS
BINDERS = control.BINDERS | transfers.BINDERS | matrices.BINDERS | wgmma.BINDERS


class Machine:
    """Attributes that the modules of instructions use:

    every: the threads of all blocks that run together, numbered through; the first `threads` are those of one block.
    tick: instructions that have run.
    copies, products: what is on its way, see `transfers` and `wgmma`.
    """

    def __init__(
        self, kernel: Kernel, grid: Block, shared_bytes: int, memory: GlobalMemory, faults: Faults, together: int
    ) -> None:
        self.kernel, self.grid, self.memory, self.faults = kernel, grid, memory, faults
        self.threads = kernel.threads
        self.every = np.arange(together * kernel.threads)
        self.symbols, size = _lay_out(kernel, shared_bytes)
        self.shared = SharedMemory(size, together, self.threads, _narrowest(kernel))
        zeros = lambda dtype, *more: np.zeros((*more, self.every.size), dtype)
        self.counter, self.waiting, self.ended = zeros(np.int64), zeros(bool), zeros(bool)
        self.block, self.place = zeros(np.int32), zeros(np.uint32, 3)  # number of each thread's block, and %ctaid
        self.copies, self.products = Queue(self.every.size), Queue(self.every.size)
        self.tick = 0
        self.pieces = _straight_pieces(kernel)
        self.steps: dict[int, list[Step]] = {}  # of each piece that has run
        self._registers: dict[Register, np.ndarray] = {}

    # -- which threads go on ------------------------------------------------------------------------------------------

    def run(self, first: int, blocks: list[Block]) -> None:
        """`first` is the number of the first block. Fewer blocks than fit leave the other threads ended."""
        count = len(blocks) * self.threads
        self.shared.reset()
        self.copies.running.clear()
        self.products.running.clear()
        self.counter[:], self.waiting[:], self.ended[:] = 0, False, self.every >= count
        self.block[:] = first + self.every // self.threads
        self.place[:, :count] = np.repeat(np.array(blocks, np.uint32).T, self.threads, axis=1)
        for values in self._registers.values():
            _spoil(values)
        while not self.ended.all():
            self._advance()

    def _advance(self) -> None:
        """One piece of straight code, for the threads furthest behind."""
        ready = ~(self.waiting | self.ended)
        if not ready.any():
            raise PtxError(f"{self.kernel.name}: threads wait at a barrier for others of their block, which have ended")
        start = int(self.counter[ready].min())
        if start not in self.pieces:
            raise PtxError(f"{self.kernel.name}: a thread ran past its last instruction")
        if start not in self.steps:
            self.steps[start] = [self._bind(i) for i in self.kernel.instructions[start : self.pieces[start]]]
        active = ready & (self.counter == start)
        self.counter[active] = self.pieces[start]  # which a jump, the last of its piece, changes
        where = bool(active.all()) or active
        for step in self.steps[start]:
            step(where)
            self.tick += 1

    def jump(self, where: Where, target: int) -> None:
        self.counter[self.select(where)] = target

    def arrive(self, where: Where) -> None:
        """At a barrier."""
        self.waiting[self.select(where)] = True
        self._release()

    def end(self, where: Where) -> None:
        self.ended[self.select(where)] = True
        self._release()

    def _release(self) -> None:
        waiting, ended = (x.reshape(-1, self.threads) for x in (self.waiting, self.ended))
        complete = waiting.any(axis=1) & (waiting | ended).all(axis=1)
        if complete.any():
            lanes = np.flatnonzero(np.repeat(complete, self.threads) & self.waiting)
            self.waiting[lanes] = False
            self.shared.barrier(lanes)

    def select(self, where: Where) -> Any:
        return slice(None) if where is True else where

    def lanes_of(self, where: Where) -> np.ndarray:
        return self.every if where is True else np.flatnonzero(where)

    def check_whole(self, where: Where, size: int, instruction: Instruction) -> np.ndarray:
        """Numbers of the warps (32) or groups of four (128) that take part, all of their threads or none."""
        if where is True:
            return self.every[: self.every.size // size]
        some = where.reshape(-1, size)
        if (some.any(axis=1) != some.all(axis=1)).any():
            raise PtxError(f"{self.kernel.name}: not all of {size} threads take part in {instruction}")
        return np.flatnonzero(some[:, 0])

    # -- operands -----------------------------------------------------------------------------------------------------

    def values(self, register: Register) -> np.ndarray:
        found = self._registers.get(register)
        if found is None:
            dtype = PREDICATE if register.bits == 1 else np.dtype(f"u{register.bits // 8}")
            found = self._registers[register] = np.empty(self.every.size, dtype)
            _spoil(found)
        return found

    def read(self, operand: Operand, kind: str) -> Array:
        """A view that always shows the operand's value as this type, or a number."""
        dtype = KINDS[kind]
        match operand:
            case Register():
                return _viewed(self.values(operand), dtype, operand)
            case Literal(text):
                return number(text, dtype)
            case Name(text) if text in self.symbols:
                return dtype.type(self.symbols[text])
            case Name(text):
                return self._special(text).astype(dtype, copy=False)  # %ctaid changes, in its place
        raise PtxError(f"operand {operand}")

    def full(self, operand: Operand, kind: str) -> np.ndarray:
        """The same, an array in any case."""
        value = self.read(operand, kind)
        return value if isinstance(value, np.ndarray) else np.full(self.every.size, value)

    def _special(self, name: str) -> np.ndarray:
        thread = (self.every % self.threads).astype(np.uint32)
        stem, _, axis = name.partition(".")
        side = "xyz".find(axis) if axis else 0
        match stem:
            case "%ctaid":
                return self.place[side]
            case "%nctaid":
                return np.full_like(thread, self.grid[side])
            case "%tid":
                return thread if side == 0 else np.zeros_like(thread)
            case "%ntid":
                return np.full_like(thread, self.threads if side == 0 else 1)
            case "%laneid":
                return thread % 32
        raise PtxError(f"special register {name}")

    def _target(self, operand: Operand, kind: str) -> np.ndarray:
        """A view of a register to write to; a register wider than an integer takes its extension."""
        if not isinstance(operand, Register):
            raise PtxError(f"{operand} cannot be written")
        values, dtype = self.values(operand), KINDS[kind]
        if values.itemsize == dtype.itemsize or PREDICATE in (dtype, values.dtype):
            return values.view(dtype)
        if values.itemsize < dtype.itemsize or dtype.kind == "f":
            raise PtxError(f"{operand.name} has not the size of {kind}")
        return values.view(f"{dtype.kind}{values.itemsize}")

    def writer(self, operand: Operand, kind: str) -> Callable[[Array, Where], None]:
        if operand == Name("_"):
            return lambda value, where: None
        target = self._target(operand, kind)

        def write(value: Array, where: Where) -> None:
            if where is True:
                target[...] = value
            else:
                np.copyto(target, value, where=where)

        return write

    def address(self, operand: Operand, space: str) -> Callable[[np.ndarray], np.ndarray]:
        """Of some threads; in shared memory counted from its start."""
        match operand:
            case Address(Name(text), offset):
                base: np.ndarray = np.full(self.every.size, self.symbols[text])
            case Address(Register() as register, offset):
                base = self.values(register)
            case _:
                raise PtxError(f"address {operand}")
        shift = offset - SHARED_BASE if space == "shared" else offset
        return lambda lanes: base[lanes].astype(np.int64) + shift

    def report(self, instruction: Instruction, lanes: np.ndarray, space: str) -> Report:
        """Notes what is wrong with an access, once for each kind."""

        def note(problems: np.ndarray, places: np.ndarray) -> None:
            for code in set(problems.tolist()) - {0}:
                which = np.flatnonzero(problems == code)
                lane, place = int(lanes[which[0]]), int(places[which[0]])
                memory = self.shared if space == "shared" else self.memory
                thread = f"block {self.place[:, lane].tolist()}, thread {lane % self.threads}"
                self.faults.add(MEANINGS[code], str(instruction), f"{memory.describe(place)}, {thread}", which.size)

        return note

    # -- instructions -------------------------------------------------------------------------------------------------

    def _bind(self, instruction: Instruction) -> Step:
        try:
            step = self._bind_unguarded(instruction)
        except (PtxError, LookupError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise PtxError(f"{self.kernel.name}: not modelled: {instruction} ({reason})") from error
        guard = instruction.guard
        if guard is None:
            return step
        negated = isinstance(guard, Negated)
        flags = self.values(guard.register if isinstance(guard, Negated) else guard)

        def guarded(where: Where) -> None:
            chosen = ~flags & where if negated else flags & where
            if chosen.any():
                step(bool(chosen.all()) or chosen)

        return guarded

    def _bind_unguarded(self, instruction: Instruction) -> Step:
        root, kind = instruction.words[0], instruction.words[-1]
        if root in OPERATIONS:
            return self._bind_operation(instruction, OPERATIONS[root](instruction, kind))
        if root not in BINDERS:
            raise PtxError("unknown")
        return BINDERS[root](self, instruction)

    def _bind_operation(self, instruction: Instruction, operation: Operation) -> Step:
        into, *origins = instruction.operands
        if len(origins) != len(operation.sources):
            raise PtxError(f"{len(origins)} operands instead of {len(operation.sources)}")
        function, sources = operation.function, [self.read(*each) for each in zip(origins, operation.sources)]
        if isinstance(function, np.ufunc) and isinstance(into, Register):  # without an array in between
            target = self._target(into, operation.result)
            if target.dtype == KINDS[operation.result] and any(isinstance(x, np.ndarray) for x in sources):
                return lambda where: function(*sources, out=target, where=where)
        write = self.writer(into, operation.result)
        return lambda where: write(function(*sources), where)


def _spoil(values: np.ndarray) -> None:
    values.view(np.uint8)[:] = 0 if values.dtype == PREDICATE else UNWRITTEN


def _viewed(values: np.ndarray, dtype: np.dtype, register: Register) -> np.ndarray:
    """As another type of this size, or as the lower part of the register."""
    if dtype == values.dtype:
        return values
    if PREDICATE in (dtype, values.dtype) or values.itemsize < dtype.itemsize:
        raise PtxError(f"{register.name} is no {dtype}")
    return values.view(dtype)[:: values.itemsize // dtype.itemsize]


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


def _straight_pieces(kernel: Kernel) -> dict[int, int]:
    """Where code that runs without a jump begins, and where it ends."""
    jumps = ("bra", "ret", "exit", "bar")
    after = {place + 1 for place, i in enumerate(kernel.instructions) if i.words[0] in jumps}
    cuts = sorted({0, len(kernel.instructions), *kernel.labels.values(), *after})
    return dict(itertools.pairwise(cuts))
