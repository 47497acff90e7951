"""Measures attention against its peers in one run.

python -m benchmarks
python -m benchmarks --only Llama-3-8B decode-16/1 --repeats 3
python -m benchmarks --quick
python -m benchmarks --gpu
"""

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

from benchmarks import ceilings, environment, gpu
from benchmarks.cases import Line, lines_of
from benchmarks.gpu_compile import memory
from benchmarks.measure import measure
from benchmarks.peers.jax_attention import compiled
from benchmarks.progress import progress_bar
from benchmarks.table import aligned, aligned_memory, describe_ceilings
from benchmarks.timing import QUICK, Settings

GPU_MEMORY = "gpu-memory"
RESULTS = Path(__file__).parent / "results"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names, on_gpu = [*lines_of("cpu"), GPU_MEMORY], gpu.names()
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"of {', '.join(names)}; with --gpu of {', '.join(on_gpu)}"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="tests and measures the GPU kernels; without it, too, on a GPU"
    )
    parser.add_argument("--repeats", type=int, help=f"turns of each peer; by default {Settings().turns}")
    parser.add_argument("--quick", action="store_true", help="small problems, few repeats: does everything run?")
    parser.add_argument(
        "--out", type=Path, help="results as JSON; by default benchmarks/results/DEVICE.json if all cases run in full"
    )
    options = parser.parse_args(arguments)
    gpu.share_memory()
    options.gpu = options.gpu or jax.default_backend() == "gpu"  # what is on the other table is for CPUs
    unknown = set(options.only or []) - set(on_gpu if options.gpu else names)
    if unknown:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}")
    return options


def command(options: argparse.Namespace) -> str:
    """Without --out, which says nothing about the numbers and may be a place on one machine."""
    words = ["python -m benchmarks --gpu" if options.gpu else "python -m benchmarks"]
    words += [f"--only {' '.join(options.only)}"] if options.only else []
    words += [f"--repeats {options.repeats}"] if options.repeats else []
    words += ["--quick"] if options.quick else []
    return " ".join(words)


def out_file(options: argparse.Namespace) -> Path | None:
    """Where results go; those of some cases or of small ones never replace the full ones unasked."""
    if options.out or options.only or options.quick:
        return options.out
    return RESULTS / f"{environment.device_kind().lower().replace(' ', '-')}.json"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    if options.gpu:
        return gpu.main(options, command(options), out_file(options))
    settings = QUICK if options.quick else Settings()
    settings = replace(settings, turns=options.repeats or settings.turns)
    start, file = time.perf_counter(), out_file(options)
    results = environment.describe(command(options))
    print(environment.header(results), flush=True)
    wanted = lambda name: options.only is None or name in options.only
    results |= {"ceilings": ceilings.measure_ceilings(settings, options.quick), "rows": []}
    print(f"ceilings  {describe_ceilings(results['ceilings'])}", flush=True)
    chosen = [line for name, line in lines_of("cpu").items() if wanted(name)]
    with progress_bar(len(chosen), "benchmarks", "line") as progress:
        for line in chosen:
            results["rows"] += measure_line(line, options.quick, settings, results["ceilings"])
            environment.save(results, file)  # after each: whatever ends this process, what is known stays
            progress.update()
    print(f"\n{aligned(results['rows'])}", flush=True)
    if wanted(GPU_MEMORY):
        results["gpu_memory"] = memory.main(options.quick)
        print(f"\n{aligned_memory(results['gpu_memory'])}")
    results["seconds"] = round(time.perf_counter() - start)
    print(f"\n{results['seconds']} s")
    environment.save(results, file)
    return results


def measure_line(line: Line, quick: bool, settings: Settings, ceiling: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every direction and peer."""
    start = time.perf_counter()
    cases = line.cases("cpu", quick)
    rows = [
        ceilings.with_rates(asdict(row), case.problem, ceiling) for case in cases for row in measure(case, settings)
    ]
    compiled.cache_clear()
    measured = [row for row in rows if row["status"] == "measured"]
    print(f"{line.name:24}{time.perf_counter() - start:6.1f} s  {len(measured)} of {len(rows)} measured", flush=True)
    return rows


if __name__ == "__main__":
    main()
