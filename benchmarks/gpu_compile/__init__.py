"""What the compilers for NVIDIA GPUs make of attention, on a machine that needs no GPU: nothing is executed."""

from benchmarks.gpu_compile.compiler import (  # noqa: F401
    Result,
    compile_cases,
    compile_program,
    lowering_for,
    results_of,
    topology_of,
    worker_environment,
)
from benchmarks.gpu_compile.kernels import LAUNCH, Kernel, Launch, launches, missing, read_kernel  # noqa: F401
from benchmarks.gpu_compile.programs import CASES, TF32, Case  # noqa: F401
from benchmarks.gpu_compile.targets import TARGETS, Target  # noqa: F401
from benchmarks.processes import ROOT  # noqa: F401
