"""What runs in the background, copies (cp.async) and products (wgmma): it ends when it is waited for, not before.

A thread closes what it has started to groups, in order, and waits for all but the last few of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from ptx_emulator.parser import Instruction, Literal, PtxError

if TYPE_CHECKING:
    from ptx_emulator.machine import Step, Where


class Work(Protocol):
    """Of several threads (a product: of several groups of them); `group` counts those that each had closed before."""

    @property
    def lanes(self) -> np.ndarray: ...
    @property
    def group(self) -> np.ndarray: ...
    def part(self, chosen: np.ndarray) -> Work: ...
    def finish(self) -> None: ...


class Queue:
    """All work of one kind."""

    def __init__(self, threads: int) -> None:
        self.running: list[Work] = []
        self.closed = np.zeros(threads, np.int64)  # groups, of each thread

    def bind(self, instruction: Instruction) -> Step | None:
        """None: the instruction neither closes a group nor waits for some."""
        if instruction.has("commit_group"):
            return self._close
        if not instruction.has("wait_group"):
            return None
        (left,) = instruction.operands
        if not isinstance(left, Literal):
            raise PtxError("waits for a number of groups that a register has")
        return lambda where: self._wait(where, left.integer())

    def _close(self, where: Where) -> None:
        self.closed[slice(None) if where is True else where] += 1

    def _wait(self, where: Where, left: int) -> None:
        running, self.running = self.running, []
        for work in running:
            done = work.group < self.closed[work.lanes] - left
            if where is not True:
                done &= where[work.lanes]
            if done.any():
                work.part(done).finish()
            if not done.all():
                self.running.append(work.part(~done))
