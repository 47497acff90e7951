"""Runs a kernel on arrays, and says what a GPU would not forgive."""

import numpy as np

from ptx_emulator.faults import Faults
from ptx_emulator.global_memory import GlobalMemory
from ptx_emulator.machine import Machine
from ptx_emulator.parser import parse

TOGETHER = 4096  # threads that run in step


class KernelFault(Exception):
    """`faults`: all that was found wrong in one launch."""

    def __init__(self, name: str, faults: Faults) -> None:
        super().__init__("\n".join([f"{name}:", str(faults)]))
        self.faults = faults


def execute(
    ptx: str,
    grid: tuple[int, ...],
    shared_bytes: int,
    inputs: list[np.ndarray],
    outputs: list[tuple[tuple[int, ...], np.dtype]],
    together: int = TOGETHER,
) -> tuple[list[np.ndarray], Faults]:
    """The outputs, given as shapes and dtypes, and what was found wrong on the way to them."""
    kernel, faults = parse(ptx), Faults()
    x, y, z = (*grid, 1, 1)[:3]
    blocks = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]  # the first axis is the fastest
    memory = GlobalMemory(inputs, [(tuple(shape), np.dtype(dtype)) for shape, dtype in outputs])
    at_once = min(len(blocks), max(1, together // kernel.threads))
    machine = Machine(kernel, (x, y, z), shared_bytes, memory, faults, at_once)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), at_once):
            machine.run(first, blocks[first : first + at_once])
    memory.find_unwritten(faults)
    return memory.results(), faults


def run(ptx: str, grid, shared_bytes: int, inputs, outputs, together: int = TOGETHER) -> list[np.ndarray]:
    """The same; raises `KernelFault` if anything was wrong."""
    results, faults = execute(ptx, grid, shared_bytes, inputs, outputs, together)
    if faults.found:
        raise KernelFault(parse(ptx).name, faults)
    return results
