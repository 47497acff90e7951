"""Attention on a mesh over two processes, which exchange by gloo on this machine."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

LIMIT = 300  # seconds


def run_processes(command: Callable[[str, int], list[str]], count: int = 2) -> list[str]:
    """What processes print that run side by side; `command` has the coordinator's address and a number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    start = lambda number: subprocess.Popen(
        [sys.executable, *command(coordinator, number)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    running = [start(number) for number in range(count)]
    try:
        printed = [process.communicate(timeout=LIMIT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * count, "\n".join(printed)
    return printed


@pytest.mark.slow
def test_two_processes():
    program = Path(__file__).parent / "processes.py"
    printed = run_processes(lambda coordinator, number: [str(program), coordinator, "2", str(number)])
    for number, text in enumerate(printed):
        assert f"process {number} agrees" in text
