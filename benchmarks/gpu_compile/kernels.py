"""Kernels as the compilers report them."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Kernel:
    """One kernel, as the compilers report it.

    Attributes:
      programs: thread blocks that are started.
      threads: of a thread block.
      registers: of a thread.
      spills: bytes that a thread stores and loads because it has no register for them.
      shared_memory: bytes of a thread block.
      wgmma, tcgen05, mma_sync: instructions for the tensor cores: those of Hopper, of Blackwell, of any.
      serialized: whether `ptxas` makes each wgmma wait for the one before, which costs most of their speed.
      async_copies: instructions that copy into shared memory in the background, by threads or by TMA.
    """

    name: str
    programs: int
    threads: int
    registers: int
    spills: int
    shared_memory: int
    wgmma: int
    tcgen05: int
    mma_sync: int
    serialized: bool
    async_copies: int


class Launch(NamedTuple):
    """How XLA's program starts a kernel: thread blocks, threads of each, and bytes of dynamic shared memory."""

    programs: int
    threads: int
    shared_memory: int


LAUNCH = re.compile(r"(\w+) grid: \[([\d, ]+)\] threads: \[([\d, ]+)\] +shared_memory: (\d+) bytes")


def launches(thunks: str) -> dict[str, Launch]:
    """By the name of the kernel, in the order in which XLA's program launches them."""
    volume = lambda sides: math.prod(map(int, sides.split(",")))
    return {
        name: Launch(volume(grid), volume(threads), int(size)) for name, grid, threads, size in LAUNCH.findall(thunks)
    }


def read_kernel(name: str, launch: Launch, ptx: str, report: str) -> Kernel:
    """`report` is what `ptxas -v` says of `ptx`, which holds one kernel."""
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report)
    if spills is None or registers is None:
        raise ValueError(f"ptxas reports neither spills nor registers of {name}: {report!r}")
    static = re.search(r"(\d+) bytes smem", report)
    return Kernel(
        name=name,
        programs=launch.programs,
        threads=launch.threads,
        registers=int(registers[1]),
        spills=int(spills[1]) + int(spills[2]),
        shared_memory=launch.shared_memory + (int(static[1]) if static else 0),
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        mma_sync=ptx.count("mma.sync"),
        serialized="wgmma.mma_async instructions are serialized" in report,
        # Not those that only start and await groups of copies, or bring something into the cache.
        async_copies=len(re.findall(r"cp\.async\.(?:c[ag]|bulk)\.(?!commit|wait|prefetch)", ptx)),
    )


def dumped_kernels(folder: Path, prefix: str) -> Iterator[Kernel]:
    """Those that XLA dumped for one program, compiled once more for their report."""
    texts = {path: path.read_text() for path in folder.glob("*.ptx")}  # a file holds one kernel, or none
    paths = {entry[1]: path for path, text in texts.items() if (entry := re.search(r"\.entry (\w+)", text))}
    (thunks,) = folder.glob("*.thunk_sequence.txt")
    for name, launch in launches(thunks.read_text()).items():
        if name.startswith(prefix):
            yield read_kernel(name, launch, texts[paths[name]], ptxas_report(paths[name], texts[paths[name]]))


def ptxas_report(path: Path, ptx: str) -> str:
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None, path.name
    command = [str(ptxas()), "-v", "-arch", architecture[1], str(path), "-o", os.devnull]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ptxas: {run.stderr}")
    return run.stderr


def plugin() -> Path:
    """The folder that `make cuda-compiler` fills, or another one."""
    return Path(os.environ.get("MQA_JAX_CUDA_PLUGIN") or Path(sys.prefix, "cuda"))


def ptxas() -> str | None:
    installed = sorted(plugin().glob("nvidia/*/bin/ptxas"))
    return str(installed[-1]) if installed else shutil.which("ptxas")


def missing() -> str | None:
    """Why nothing can be compiled, or None if it can."""
    if not any(plugin().glob("jax_plugins/xla_cuda*")):
        return "JAX's compiler for CUDA is not installed: `make cuda-compiler`"
    if ptxas() is None:
        return "ptxas is not installed: `make cuda-compiler`"
    return None


def ptxas_version() -> str:
    text = subprocess.run([str(ptxas()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "unknown"
