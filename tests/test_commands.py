"""The commands of the Makefile start: what they import is found without the paths that pytest adds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = re.findall(
    r"^\t\$\(RUN\) (\S*(?:tests|examples|benchmarks)\S*)", (ROOT / "Makefile").read_text(), re.MULTILINE
)
COMMANDS += re.findall(r"^\t\$\(RUN\) (-m benchmarks\S*)", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_there_are_commands():
    assert {"tests/emulate.py", "tests/fuzz.py", "examples/generate.py", "-m benchmarks"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_starts(command):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    shown = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert "usage:" in shown.stdout
