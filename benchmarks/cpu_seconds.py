"""What programs take on a CPU: processor time, which other programs disturb less than a clock, and temporary memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import environment


class Cost(NamedTuple):
    seconds: float  # of processors, the least of some runs
    memory: float  # MiB

    def __str__(self) -> str:
        return f"{self.seconds:8.3f} CPU s {self.memory:9.1f} MiB"


def measured(ways: dict[str, Callable[..., Any]], arrays: Sequence[Array], runs: int) -> dict[str, Cost]:
    """They run in turns."""
    programs = {name: jax.jit(way).lower(*arrays).compile() for name, way in ways.items()}
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(runs):
        for name, program in programs.items():
            start = time.process_time()
            jax.block_until_ready(program(*arrays))
            seconds[name] = min(seconds[name], time.process_time() - start)
    analyses: dict[str, Any] = {name: program.memory_analysis() for name, program in programs.items()}
    return {name: Cost(seconds[name], analyses[name].temp_size_in_bytes / 2**20) for name in ways}


def normal(*shapes: Sequence[int]) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]


def print_header(module: str, options: str) -> None:
    print(environment.header(environment.describe(f"python -m {module} {options}", ("jax", "jaxlib"))), end="\n\n")
