"""What the compilers for NVIDIA GPUs make of attention, on a machine that needs no GPU: nothing is executed."""

from benchmarks.gpu_compile.compiler import (
    Result,
    compile_cases,
    compile_program,
    lowering_for,
    results_of,
    topology_of,
    worker_environment,
)
from benchmarks.gpu_compile.kernels import LAUNCH, Kernel, Launch, launches, missing, read_kernel
from benchmarks.gpu_compile.programs import CASES, TF32, Case
from benchmarks.gpu_compile.targets import TARGETS, Target
from benchmarks.processes import ROOT

__all__ = [
    "CASES",
    "LAUNCH",
    "ROOT",
    "TARGETS",
    "TF32",
    "Case",
    "Kernel",
    "Launch",
    "Result",
    "Target",
    "compile_cases",
    "compile_program",
    "launches",
    "lowering_for",
    "missing",
    "read_kernel",
    "results_of",
    "topology_of",
    "worker_environment",
]
