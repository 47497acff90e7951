"""Attention on the GPU at hand: the tests first, then the speed of this library and of its peers.

Two programs of each peer are timed: the output alone, and the output with the gradients of query, key and value. Nobody
offers the backward pass alone in public, so "backward" is the difference of the two.

What continues a cache has no gradients. `benchmarks.ceilings` says what FLOP/s, bytes a second and their shares are.

Everything that runs on the GPU does so in processes of its own: a kernel that breaks the GPU for its process, or never
ends, is the result of its case, and the next case gets another process.
"""

import argparse
import collections
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp

from benchmarks import environment, judge, processes, timing
from benchmarks.cases import Case, Line, lines_of
from benchmarks.ceilings import measure_ceilings, with_rates
from benchmarks.measure import Row, measure, row_of
from benchmarks.peers import jax_attention
from benchmarks.problems import BACKWARD, BOTH, FORWARD, Problem
from benchmarks.progress import progress_bar
from benchmarks.table import aligned, describe_ceilings
from benchmarks.timing import Settings

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "torch", "triton", "tokamax")
TURNS = Settings(turns=5, turn_seconds=0.05)
MAX_SECONDS = 7.5 * 60  # seconds of the whole run; what has not been measured by then is reported so
MAX_TEST_SECONDS = 4 * 60
MAX_CASE_SECONDS = 2 * 60


def names() -> tuple[str, ...]:
    """What can be asked for."""
    return ("tests", *lines_of("gpu"))


# -- the command ------------------------------------------------------------------------------------------------------


def share_memory() -> None:
    """PyTorch and the other processes need some as well. JAX reads this when it first sees the GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def main(options: argparse.Namespace, command: str, file: Path | None) -> dict[str, Any]:
    end = time.monotonic() + MAX_SECONDS
    has_gpu = jax.default_backend() == "gpu"
    if not has_gpu and not options.quick:
        raise SystemExit(
            f"There is no GPU here that JAX can use (jax.default_backend() is {jax.default_backend()!r}). "
            "`--gpu --quick` runs everything on small problems, in interpret mode."
        )
    results = environment.describe(command, PACKAGES)
    results["machine"]["driver"] = environment.driver()
    print(environment.header(results), flush=True)
    chosen = [name for name in names() if not options.only or name in options.only]
    reason = "not asked for" if "tests" not in chosen else "--quick" if options.quick else None
    results |= {"tests": f"not run: {reason}" if reason else run_tests(), "ceilings": {}, "rows": []}
    print(f"tests     {results['tests']}", flush=True)
    lines = [name for name in chosen if name != "tests"]
    settings = timing.QUICK if options.quick else TURNS
    settings = replace(settings, turns=options.repeats or settings.turns)
    with progress_bar(len(lines) + 1, "gpu", "line") as progress:
        for name, found in work(["ceilings", *lines], options.quick, settings, end):
            if name == "ceilings":
                results["ceilings"] = found
                print(f"ceilings  {describe_ceilings(found)}", flush=True)
            else:
                rows = rated(found, lines_of("gpu")[name], options.quick, results["ceilings"])
                results["rows"] += rows
                print(f"\n{name}: {rows[0]['problem']}\n{aligned(rows)}", flush=True)
            environment.save(results, file)  # after each case: whatever ends this process, what is known stays
            progress.update()
    if results["tests"].startswith("failed"):
        raise SystemExit(f"tests {results['tests']}")
    return results


def run_tests() -> str:
    """What became of the tests that run on a GPU: "passed", "failed" or "not run", and more."""
    missing = [name for name in ("pytest", "hypothesis", "jaxtyping") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not run: {', '.join(missing)} not installed; every case is checked before it is timed"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--gpu", "tests"]
        command += [f"--junitxml={report}", "--continue-on-collection-errors"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, environment.usable_cores()))]
        if importlib.util.find_spec("beartype") is None:
            print("tests     beartype is not installed: shapes in signatures are not checked", flush=True)
            command += ["-o", "addopts="]
        with subprocess.Popen(command, cwd=processes.ROOT, start_new_session=True) as tests:
            try:
                status = tests.wait(MAX_TEST_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(tests.pid, signal.SIGKILL)  # and the processes that it started
                return f"failed: they took longer than {MAX_TEST_SECONDS} s"
        return verdict(status, report)


def verdict(status: int, report: Path) -> str:
    """With --gpu only tests that run on a GPU are run: if none has passed, nothing has been tested.

    A file of tests that wants a package that is not here, for other tests of its, is named, and is no failure.
    """
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcomes = {case.get("classname", "") + case.get("name", ""): outcome(case) for case in cases}
    count = collections.Counter(outcomes.values())
    absent = sorted(name for name, found in outcomes.items() if found == "absent")
    summary = ", ".join(f"{count[found]} {found}" for found in ("passed", "failed", "skipped")) + " on the GPU"
    summary += f"; not imported, for want of packages: {', '.join(absent)}" if absent else ""
    if count["failed"] or not count["passed"] or status not in (0, 1) or (status and not absent):
        return f"failed: {summary}; pytest ended with status {status}"
    return f"passed: {summary}"


def outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag == "error" and "ModuleNotFoundError: No module named" in (child.text or ""):
            return "absent"
        if child.tag in ("error", "failure"):
            return "failed"
        if child.tag == "skipped":
            return "skipped"
    return "passed"


def rated(rows: list[dict[str, Any]], line: Line, quick: bool, ceilings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with rates; those of the backward pass are for what it adds to the forward pass."""
    problems: dict[str, Any] = {case.direction: case.problem for case in line.cases("gpu", quick)}
    if BOTH in problems:
        problems[BACKWARD] = Added(problems[BOTH], problems[FORWARD])
    return [with_rates(row, problems[row["direction"]], ceilings) for row in rows]


class Added:
    """What one problem needs beyond another."""

    def __init__(self, whole: Any, part: Any) -> None:
        self.flops, self.bytes, self.dtype = whole.flops - part.flops, whole.bytes - part.bytes, whole.dtype


# -- the processes that run on the GPU --------------------------------------------------------------------------------

WORKER = "from benchmarks import gpu, processes; processes.serve(gpu.answer)"


def work(names: Sequence[str], quick: bool, settings: Settings, end: float) -> Iterator[tuple[str, Any]]:
    """What is found for each name, in their order: ceilings, or rows. That a name ends its process is one such."""
    how = json.dumps({"quick": quick, "settings": asdict(settings)})
    for name, found in processes.results_of(WORKER, [how], names, "its process", None, MAX_CASE_SECONDS, end):
        yield name, nothing(name, quick, found) if isinstance(found, str) else found


def nothing(name: str, quick: bool, message: str) -> Any:
    """What is found where nothing is."""
    if name == "ceilings":
        return {"error": message}
    cases = lines_of("gpu")[name].cases("gpu", quick)
    rows = {
        case.direction: [row_of(case, peer, status="raised", message=message) for peer in case.peers] for case in cases
    }
    return as_dicts(rows)


def answer(how: str, name: str) -> Any:
    """What a process finds for a name. One that has lost its GPU is replaced for the next."""
    if not works():
        os._exit(processes.WORN_OUT)  # no farewell to the driver, which may not answer
    order = json.loads(how)
    quick, settings = order["quick"], Settings(**order["settings"])
    return measure_ceilings(settings, quick) if name == "ceilings" else measure_line(name, quick, settings)


def works() -> bool:
    """Whether the GPU still does something for this process."""
    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except Exception:  # whatever it is
        return False
    return True


# -- measuring --------------------------------------------------------------------------------------------------------


def measure_line(name: str, quick: bool, settings: Settings) -> list[dict[str, Any]]:
    """Rows of every direction and peer."""
    cases = lines_of("gpu")[name].cases("gpu", quick)
    compile_ahead([case for case in cases if isinstance(case.problem, Problem)])
    rows = {case.direction: measure(case, settings) for case in cases}
    jax_attention.compiled.cache_clear()
    return as_dicts(rows)


def as_dicts(rows: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """With those of the backward pass, where there are both to take it from."""
    if BOTH in rows:
        rows = {FORWARD: rows[FORWARD], BACKWARD: differences(rows[FORWARD], rows[BOTH]), BOTH: rows[BOTH]}
    return [asdict(row) for found in rows.values() for row in found]


def compile_ahead(cases: Sequence[Case]) -> None:
    """All programs at once, in threads, and the numbers that they get. What fails does so again, as a row."""
    if not cases:
        return
    problems = dict.fromkeys(x for case in cases for x in (case.problem, case.checked) if x)
    with ThreadPoolExecutor(min(16, environment.usable_cores())) as pool:
        pool.submit(jax_attention.on_device, jax_attention.without_gradients(cases[0].problem))
        pool.submit(judge.allowed, "ours", cases[0].checked or cases[0].problem)
        for problem in problems:
            for name in jax_attention.names_for(problem, "gpu"):
                pool.submit(jax_attention.runnable, jax_attention.program_name(name, "gpu"), problem)


def differences(forward: Sequence[Row], both: Sequence[Row]) -> list[Row]:
    """Rows of the backward pass. How it is compiled, and what memory it takes, is not known."""
    costs = [less(x.cost, y.cost) for x, y in zip(both, forward)]
    return [
        replace(
            first if first.status != "measured" else second,
            direction=BACKWARD,
            cost=cost,
            ratio=cost / costs[0] if cost and costs[0] and number else None,
            compile_seconds=None,
            temporaries=None,
        )
        for number, (first, second, cost) in enumerate(zip(forward, both, costs))
    ]


def less(whole: float | None, part: float | None) -> float | None:
    """The difference, if there is one that is no noise."""
    return None if whole is None or part is None or whole <= part else whole - part
