"""For real models: what this suite sets for fast compilation (`conftest.py`) makes them slow to run."""

import functools
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(program: str) -> None:
    """Runs Python code, which finds the modules that tests find, without the suite's settings of XLA."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(
        [sys.executable, "-c", program], env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True
    )


ON_DEVICES = """
import os
import conftest
conftest.look_for_garbage_rarely()
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *conftest.FAST_TO_COMPILE])
"""


def run_on_devices(program: str) -> None:
    """With 8 CPU devices, whose number is set before JAX uses any, and the suite's settings."""
    run(ON_DEVICES + program)


def read_gguf_once(monkeypatch) -> None:
    """Otherwise transformers reads a GGUF file four times, with a table of names for each module of the model."""
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
