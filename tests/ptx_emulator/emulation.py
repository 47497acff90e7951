"""Within `emulated(gpu)` the library's Triton kernels run, compiled for that GPU, on the emulator.

Nothing else changes: the implementation is "triton", which is also what `None` and the modules take there; its Python
runs as on a GPU, under jit, vmap and grad. A kernel is compiled when it is traced and executed when its program runs.
"""

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from benchmarks import gpu_compile
from mqa_jax import attention
from mqa_jax.kernels.gpu import assuming
from mqa_jax.kernels.triton import call
from ptx_emulator import compiler
from ptx_emulator.compiler import Compiled

GPUS = "a100", "h100", "l40s"  # B200's kernels use TMA, mbarrier and tcgen05, which are not modelled


def missing() -> str | None:
    """Why nothing can be emulated, or None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "the extra `emulate` (numba) is not installed: `make emulate`"
    return gpu_compile.missing()


@dataclass(frozen=True)
class Ran:
    """One launch, with all that is needed for another one."""

    name: str
    compiled: Compiled
    inputs: list[np.ndarray]
    outputs: list[tuple[tuple[int, ...], np.dtype]]
    results: list[np.ndarray]
    seconds: float


@dataclass
class Emulation:
    """`keep`: whether `ran` keeps arrays."""

    gpu: str
    executor: ThreadPoolExecutor
    keep: bool = False
    ran: list[Ran] = field(default_factory=list)

    def names(self) -> list[str]:
        return [one.name for one in self.ran]

    def launcher(self, name: str, launch: Callable[..., Any], out: Any) -> Callable[..., Any]:
        """For `call.launched_by`."""

        def run(*arguments: Any) -> Any:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
            compiled = compiler.compile_kernel(self.gpu, name, launch, shapes)
            results = [(x.shape, np.dtype(x.dtype)) for x in jax.tree.leaves(out)]

            def execute(*leaves: Any) -> Any:
                arrays = [np.asarray(x) for x in leaves]
                found = self.executor.submit(self._execute, name, compiled, arrays, results).result()
                return jax.tree.unflatten(jax.tree.structure(out), found)

            return jax.pure_callback(execute, out, *jax.tree.leaves(arguments), vmap_method="sequential")

        return run

    def _execute(self, name: str, compiled: Compiled, inputs: list[np.ndarray], outputs: Any) -> list[np.ndarray]:
        from ptx_emulator import launch  # needs numba

        start = time.perf_counter()
        results = launch.run(compiled.ptx, compiled.grid, compiled.shared_bytes, inputs, outputs)
        seconds = time.perf_counter() - start
        kept = [list(x) if self.keep else [] for x in (inputs, outputs, results)]
        self.ran.append(Ran(name, compiled, kept[0], kept[1], kept[2], seconds))
        return results


@contextlib.contextmanager
def emulated(gpu: str, keep: bool = False) -> Iterator[Emulation]:
    """Wrong accesses raise, in the message of the error that a failing callback gives: see `launch.KernelFault`."""
    target, before = gpu_compile.TARGETS[gpu], attention.IMPLEMENTATIONS["triton"]
    with ThreadPoolExecutor(1) as executor:
        # XLA's threads flush denormal numbers, and so do threads that they start. This one starts here.
        executor.submit(int).result()
        emulation = Emulation(gpu, executor, keep)
        attention.IMPLEMENTATIONS["triton"] = replace(before, platform=None)
        try:
            with assuming(target.architecture), call.launched_by(emulation.launcher):
                yield emulation
        finally:
            attention.IMPLEMENTATIONS["triton"] = before
