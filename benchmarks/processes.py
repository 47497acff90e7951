"""Work in processes of its own: one that breaks its GPU or its compiler, or never ends, costs a single result."""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import LOCATION

ROOT = Path(__file__).parents[1]
MARK = "found: "  # begins a line of results; libraries print what they like
WORN_OUT = 75  # the status of a process that can do no more, after the results of the order that broke it


def results_of(
    program: str,
    arguments: Sequence[str],
    orders: Sequence[Any],
    name: str,
    environment: Mapping[str, str] | None = None,
    longest: float = threading.TIMEOUT_MAX,
    end: float = float("inf"),
) -> Iterator[tuple[Any, Any]]:
    """Each order, JSON, with what a process of this program prints for it, or how that ended: a string, unlike results.

    Args:
      arguments: of the program; the last one, after these, is a list of orders.
      name: of the process, for the string.
      longest: seconds that an order may take.
      end: of all, on the clock `time.monotonic`.
    """
    remaining = list(orders)
    while remaining:
        command, count = [sys.executable, "-c", program, *arguments, json.dumps(remaining)], len(remaining)
        with (
            tempfile.TemporaryFile("w+", errors="replace") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
            ) as process,
        ):
            while remaining and (line := _next_line(process, min(longest, end - time.monotonic()))):
                if line.startswith(MARK):
                    yield remaining.pop(0), json.loads(line.removeprefix(MARK))
            status = _end_of(process)
            log.seek(0)
            last_words = log.read().strip().rpartition("\n")[2]
        if time.monotonic() > end:
            yield from ((order, "time is up") for order in remaining)
            return
        if remaining and not (status == WORN_OUT and len(remaining) < count):
            yield remaining.pop(0), LOCATION.sub("", f"{name} ended with status {status}: {last_words}")


def _next_line(process: subprocess.Popen, seconds: float) -> str:
    """Empty if the process ends first; after so many seconds it is ended."""
    assert process.stdout is not None  # for mypy: it is a pipe
    timer = threading.Timer(max(seconds, 0), process.kill)
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()


def _end_of(process: subprocess.Popen) -> int:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(timeout=10)
    process.kill()
    return process.wait()


def serve(answer: Callable[..., Any]) -> None:
    """The program of a process: prints what is found for each order."""
    *arguments, orders = sys.argv[1:]
    for order in json.loads(orders):
        print(f"{MARK}{json.dumps(answer(*arguments, order))}", flush=True)
