"""What the compilers for NVIDIA GPUs make of attention, on a machine that needs no GPU: nothing is executed.

python -m benchmarks.gpu_compile
python -m benchmarks.gpu_compile --targets h100 --only Llama-3-8B Falcon --out compiled.json

XLA's compiler for GPUs runs whole, so memory is exact; `ptxas` says what a kernel takes. `make cuda-compiler` installs
both. They want a JAX that is set up for them from its start, so each target has a process of its own.
"""

import argparse
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.gpu_compile import compiler, kernels
from benchmarks.gpu_compile.compiler import Result
from benchmarks.gpu_compile.kernels import Kernel
from benchmarks.gpu_compile.programs import CASES
from benchmarks.gpu_compile.targets import TARGETS
from benchmarks.progress import progress_bar

COLUMNS: dict[str, Callable[[Kernel], object]] = {
    "kernel": lambda kernel: kernel.name,
    "programs": lambda kernel: kernel.programs,
    "threads": lambda kernel: kernel.threads,
    "registers": lambda kernel: kernel.registers,
    "spilled bytes": lambda kernel: kernel.spills,
    "shared KiB": lambda kernel: f"{kernel.shared_memory / 2**10:.1f}",
    "wgmma": lambda kernel: f"{kernel.wgmma}{' serialized' if kernel.serialized else ''}",
    "tcgen05": lambda kernel: kernel.tcgen05,
    "mma.sync": lambda kernel: kernel.mma_sync,
    "cp.async": lambda kernel: kernel.async_copies,
}


def aligned(results: Sequence[Result]) -> str:
    """A line for each kernel, with the temporaries of its whole program; what did not compile comes last."""
    lines: list[tuple[str, ...]] = [("target", "case", *COLUMNS, "resident", "temporary MiB")]
    for result in results:
        temporaries = "" if result.temporaries is None else f"{result.temporaries / 2**20:.1f}"
        for kernel in result.kernels:
            columns = (str(column(kernel)) for column in COLUMNS.values())
            resident = str(TARGETS[result.target].resident(kernel))
            lines.append((result.target, result.case, *columns, resident, temporaries))
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = "<<<" + ">" * (len(widths) - 3)  # names, then numbers
    text = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)) for line in lines]
    return "\n".join(text + [f"{result.target}  {result.case}: {result.error}" for result in results if result.error])


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--only", nargs="+", metavar="SUBSTRING", help="cases whose names have one of these in them")
    parser.add_argument("--out", type=Path, help="results as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    reason = kernels.missing()
    if reason is not None:
        raise SystemExit(reason)
    cases = [case for case in CASES if any(part in str(case) for part in options.only or [""])]
    if not cases:
        raise SystemExit(f"no case has any of {options.only} in its name")
    results: list[Result] = []
    with progress_bar(len(options.targets) * len(cases), "compiling", "program") as progress:
        for target in options.targets:
            for result in compiler.compile_cases(target, cases):
                results.append(result)
                progress.update()
    print(aligned(results))
    words = ["python -m benchmarks.gpu_compile", "--targets", *options.targets]
    words += ["--only", shlex.join(options.only)] if options.only else []
    described = environment.describe(" ".join(words))
    written = {
        "command": described["command"],
        "date": described["date"],
        "versions": {**described["versions"], "ptxas": kernels.ptxas_version()},
        "rows": [asdict(result) for result in results],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(written, indent=2) + "\n")
    return written


if __name__ == "__main__":
    main()
