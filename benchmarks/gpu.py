"""Attention on the GPU at hand: the tests first, then the speed of this library and of its peers.

Two programs of each peer are timed: the output alone, and the output with the gradients of query, key and value. Nobody
offers the backward pass alone in public, so "backward" is the difference of the two.

Each is given with its FLOP/s, their share of those of a large matrix product, and how many times as long as ours it
takes. Steps of decoding have no gradients, and instead of FLOP/s the bytes of keys and values that they read in a
second, with their share of what a copy reads and writes.

Everything that runs on the GPU does so in processes of its own: a kernel that breaks the GPU for its process, or never
ends, is the result of its case, and the next case gets another process. `WORKER` is what such a process runs.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import environment, gpu_peers, timing
from benchmarks.cases import Case
from benchmarks.gpu_peers import JAX_PEERS, Problem, peers_of, precision_of
from benchmarks.measure import LOCATION, Row, measure
from benchmarks.progress import progress_bar
from benchmarks.table import aligned, describe_ceilings
from benchmarks.timing import Settings

CAUSAL = Problem(batch=4, queries=4096, keys=4096, heads=16, kv_heads=16, head_dim=128, is_causal=True)
MHA = replace(CAUSAL, heads=32, kv_heads=32)
GQA = replace(MHA, kv_heads=8)
LONG = replace(GQA, batch=1, queries=16384, keys=16384)
STEP = Problem(batch=8, queries=1, keys=32768, heads=8, kv_heads=1, head_dim=128)
STEPS = replace(STEP, batch=32, kv_heads=8)

PROBLEMS = {
    "full": replace(CAUSAL, is_causal=False),
    "causal": CAUSAL,
    "mha": MHA,
    "mqa": replace(MHA, kv_heads=1),
    "gqa": GQA,
    "head-64": replace(GQA, head_dim=64),
    "head-256": replace(MHA, heads=8, kv_heads=1, head_dim=256),
    "long": LONG,
    "window": replace(LONG, window=4096),
    "alibi": replace(MHA, alibi=True),
    "documents": replace(GQA, batch=2, queries=8192, keys=8192, documents=4),
    "dropout": replace(GQA, dropout=0.1),
    "head-80": replace(MHA, head_dim=80),
    "head-96": replace(MHA, head_dim=96),
    "float16": replace(GQA, dtype="float16"),
    "float32": replace(CAUSAL, queries=2048, keys=2048, dtype="float32"),
    # What we aim at on an H100, and in brackets the best that others have published there.
    "decode-mqa": STEP,  # 2.2 TB/s (1.63)
    "decode-one": replace(STEP, batch=1),  # 1.0 TB/s (0.50)
    "decode-gqa": STEPS,
    # 1.6 times as fast as decode-gqa. 131072 keys would make arrays of 4 GiB, which JAX cannot reach byte by byte.
    "decode-int8": replace(STEPS, key_dtype="int8"),
    "decode-long": replace(STEPS, keys=131072),  # 2.9 TB/s (3.16)
    "decode-window": replace(STEPS, batch=8, keys=131072, window=4096),  # 0.2 ms (0.196)
}
NAMES = ("tests", *PROBLEMS)
DIRECTIONS = ("forward", "backward", "forward+backward")
CHECKED_LENGTH = 512 + 62  # no multiple of any tile, even for cuDNN, and all scores fit

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "torch", "triton", "tokamax")
TURNS = Settings(turns=5, turn_seconds=0.05)
LONGEST = 7.5 * 60  # seconds of the whole run; what has not been measured by then is reported so
LONGEST_TESTS = 4 * 60
LONGEST_CASE = 2 * 60


# -- the command ------------------------------------------------------------------------------------------------------


def share_memory() -> None:
    """PyTorch and the other processes need some as well. JAX reads this when it first sees the GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def main(options: argparse.Namespace, command: str, file: Path | None) -> dict[str, Any]:
    end = time.monotonic() + LONGEST
    has_gpu = jax.default_backend() == "gpu"
    if not has_gpu and not options.quick:
        raise SystemExit(
            f"There is no GPU here that JAX can use (jax.default_backend() is {jax.default_backend()!r}). "
            "`--gpu --quick` runs everything on small problems, in interpret mode."
        )
    results = environment.describe(command, PACKAGES)
    results["machine"]["driver"] = environment.driver()
    print(environment.header(results), flush=True)
    chosen = [name for name in NAMES if not options.only or name in options.only]
    reason = "not asked for" if "tests" not in chosen else "--quick" if options.quick else None
    results |= {"tests": f"not run: {reason}" if reason else run_tests(), "ceilings": {}, "rows": []}
    print(f"tests     {results['tests']}", flush=True)
    names = [name for name in chosen if name != "tests"]
    settings = timing.QUICK if options.quick else TURNS
    settings = replace(settings, turns=options.repeats or settings.turns)
    with progress_bar(len(names) + 1, "gpu", "case") as progress:
        for name, found in work(["ceilings", *names], options.quick, settings, end):
            if name == "ceilings":
                results["ceilings"] = found
                print(f"ceilings  {describe_ceilings(found)}", flush=True)
            else:
                problem = problem_of(name, options.quick)
                rows = with_rates(found, problem, results["ceilings"])
                results["rows"] += rows
                print(f"\n{name}: {problem}\n{aligned(rows, ['peer'])}", flush=True)
            if file is not None:  # after each case: whatever ends this process, what is known stays
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(results, indent=2) + "\n")
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
        with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as tests:
            try:
                status = tests.wait(LONGEST_TESTS)
            except subprocess.TimeoutExpired:
                os.killpg(tests.pid, signal.SIGKILL)  # and the processes that it started
                return f"failed: they took longer than {LONGEST_TESTS} s"
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


def with_rates(rows: list[dict[str, Any]], problem: Problem, ceilings: dict[str, Any]) -> list[dict[str, Any]]:
    """FLOP/s, or bytes a second, and their share of what a large matrix product, or a copy, reaches on this device."""
    ceiling = ceilings.get("copy") if problem.is_step else ceilings.get("matmul", {}).get(problem.dtype)
    name = "bandwidth" if problem.is_step else "flops"
    for row in rows:
        row |= {"flops": None, "bandwidth": None, "share": None}
        if row["cost"]:
            work = problem.cache_bytes if problem.is_step else flops(problem, row["direction"])
            row[name] = work / row["cost"]
            row["share"] = ceiling and row[name] / ceiling
    return rows


def flops(problem: Problem, direction: str) -> float:
    forward, both = (replace(problem, gradients=gradients).flops for gradients in (False, True))
    return {"forward": forward, "backward": both - forward, "forward+backward": both}[direction]


# -- the processes that run on the GPU --------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
WORKER = "from benchmarks import gpu; gpu.work_here()"
MARK = "found: "  # begins a line of results; libraries print what they like
WORN_OUT = 75  # the status of a process that has seen its GPU break, after the results of the case that broke it


def work(names: Sequence[str], quick: bool, settings: Settings, end: float) -> Iterator[tuple[str, Any]]:
    """What is found for each name, in their order: ceilings, or rows. That a name ends its process is one such."""
    remaining = list(names)
    while remaining:
        order = json.dumps({"names": remaining, "quick": quick, "settings": asdict(settings)})
        count = len(remaining)
        with (
            tempfile.TemporaryFile("w+", errors="replace") as log,
            subprocess.Popen(
                [sys.executable, "-c", WORKER, order], stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT
            ) as worker,
        ):
            while remaining and (line := next_line(worker, min(LONGEST_CASE, end - time.monotonic()))):
                if line.startswith(MARK):
                    yield remaining.pop(0), json.loads(line.removeprefix(MARK))
            status = end_of(worker)
            log.seek(0)
            last_words = log.read().strip().rpartition("\n")[2]
        if time.monotonic() > end:
            yield from ((name, nothing(name, quick, "time is up")) for name in remaining)
            return
        if remaining and not (status == WORN_OUT and len(remaining) < count):
            message = LOCATION.sub("", f"its process ended with status {status}: {last_words}")
            name = remaining.pop(0)
            yield name, nothing(name, quick, message)


def next_line(worker: subprocess.Popen, seconds: float) -> str:
    """Empty if the process ends first; after so many seconds it is ended."""
    assert worker.stdout is not None  # for mypy: it is a pipe
    timer = threading.Timer(max(seconds, 0), worker.kill)
    timer.start()
    try:
        return worker.stdout.readline()
    finally:
        timer.cancel()


def end_of(worker: subprocess.Popen) -> int:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return worker.wait(timeout=10)
    worker.kill()
    return worker.wait()


def nothing(name: str, quick: bool, message: str) -> Any:
    """What is found where nothing is."""
    if name == "ceilings":
        return {"error": message}
    problem = str(problem_of(name, quick))
    rows = [Row(name, problem, "ms", peer, "raised", None, None, None, message) for peer in peers_of(PROBLEMS[name])]
    return [{**asdict(row), "direction": direction} for direction in directions_of(PROBLEMS[name]) for row in rows]


def directions_of(problem: Problem) -> tuple[str, ...]:
    return DIRECTIONS[:1] if problem.is_step else DIRECTIONS


def work_here() -> None:
    """What a process of its own does: prints a line for each name."""
    order = json.loads(sys.argv[1])
    quick, settings = order["quick"], Settings(**order["settings"])
    for name in order["names"]:
        found = ceilings(quick, settings) if name == "ceilings" else measure_problem(name, quick, settings)
        print(f"{MARK}{json.dumps(found)}", flush=True)
        if not works():
            os._exit(WORN_OUT)  # no farewell to the driver, which may not answer


def works() -> bool:
    """Whether the GPU still does something for this process."""
    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except Exception:  # whatever it is
        return False
    return True


# -- measuring --------------------------------------------------------------------------------------------------------


def ceilings(quick: bool, settings: Settings) -> dict[str, Any]:
    """What the device does at best: FLOP/s of a large matrix product, bytes a second, read and written, of a copy."""
    size = 256 if quick else 8192
    numbers = jax.random.normal(jax.random.key(0), (2, size, size))  # zeros would need less power, and so be faster
    products = {}
    for dtype in ("bfloat16", "float16", "float32"):
        with precision_of(dtype):
            products[dtype] = 2 * size**3 / least_seconds(jnp.matmul, numbers.astype(dtype), settings)
    array = jnp.zeros((1, 1 << (20 if quick else 28)), jnp.float32)
    return {"matmul": products, "copy": 2 * array.nbytes / least_seconds(lambda x: x + 1, array, settings)}


def least_seconds(function: Callable[..., Array], arguments: Array, settings: Settings) -> float:
    program = jax.jit(function)
    run = functools.partial(program, *arguments)
    turns = range(settings.turns)
    return min(timing.seconds_per_call(run, settings.turn_seconds, jax.block_until_ready) for _ in turns)


def problem_of(name: str, quick: bool) -> Problem:
    return PROBLEMS[name].small() if quick else PROBLEMS[name]


def measure_problem(name: str, quick: bool, settings: Settings) -> list[dict[str, Any]]:
    """Rows of every direction and peer."""
    problem = problem_of(name, quick)
    checked = None if quick else problem.at_length(CHECKED_LENGTH)
    directions = directions_of(problem)
    timed = [direction for direction in directions if direction != "backward"]
    cases = {direction: case_of(name, problem, checked, direction != "forward") for direction in timed}
    compile_ahead(*cases.values())
    rows = {direction: measure(case, settings) for direction, case in cases.items()}
    if "backward" in directions:
        rows["backward"] = differences(rows["forward"], rows["forward+backward"])
    gpu_peers.compiled.cache_clear()
    return [{**asdict(row), "direction": direction} for direction in directions for row in rows[direction]]


def case_of(name: str, problem: Problem, checked: Problem | None, gradients: bool) -> Case:
    return Case(
        name,
        "ms",
        replace(problem, gradients=gradients),
        peers_of(problem),
        reference=gpu_peers.exact,
        checked=checked and replace(checked, gradients=gradients),
        allowed=gpu_peers.allowed,
    )


def compile_ahead(*cases: Case) -> None:
    """All programs at once, in threads, and the numbers that they get. What fails does so again, as a row."""
    programs = {(peer, x) for case in cases for x in (case.problem, case.checked) if x for peer in JAX_PEERS}
    with ThreadPoolExecutor(min(16, environment.usable_cores())) as pool:
        pool.submit(gpu_peers.on_device, gpu_peers.without_gradients(cases[0].problem))
        pool.submit(gpu_peers.allowed, "ours", cases[0].checked or cases[0].problem)
        for program in programs:
            pool.submit(gpu_peers.compiled, *program)


def differences(forward: Sequence[Row], both: Sequence[Row]) -> list[Row]:
    """Rows of the backward pass."""
    costs = [less(x.cost, y.cost) for x, y in zip(both, forward)]
    return [
        replace(
            first if first.status != "measured" else second,
            cost=cost,
            ratio=cost / costs[0] if cost and costs[0] and number else None,
        )
        for number, (first, second, cost) in enumerate(zip(forward, both, costs))
    ]


def less(whole: float | None, part: float | None) -> float | None:
    """The difference, if there is one that is no noise."""
    return None if whole is None or part is None or whole <= part else whole - part
