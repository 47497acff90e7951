"""What a reader must know to repeat a measurement: command, machine, versions, date. No paths, no host names."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import mqa_jax

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokamax", "torch", "transformers")


def describe(command: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    return {
        "command": command,
        "date": today(),
        "machine": {"cpu": cpu_model(), "cores": usable_cores(), "load": load(), "device": device_kind()},
        "versions": {
            "python": platform.python_version(),
            "mqa_jax": mqa_jax.__version__,
            **{package: version(package) for package in packages},
        },
    }


def save(results: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=2) + "\n")


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def header(environment: dict[str, Any]) -> str:
    """The same for a reader."""
    machine, versions = environment["machine"], environment["versions"]
    return (
        f"command   {environment['command']}\n"
        f"machine   {machine['cpu']}, {machine['cores']} cores, load {machine['load']}; JAX on {machine['device']}\n"
        f"versions  {', '.join(f'{name} {number}' for name, number in versions.items())}\n"
        f"date      {environment['date']}"
    )


def cpu_model() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", information.read_text(), re.M) if information.exists() else None
    return found[1] if found else platform.machine()


def usable_cores() -> int:
    """Torch gets as many threads; XLA takes as many itself."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """Programs that wanted a core in the last minute: far from 0, the numbers that follow are worth little."""
    return round(os.getloadavg()[0], 2)


def device_kind() -> str:
    return jax.devices()[0].device_kind


def driver() -> str:
    """Of the NVIDIA GPU."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
