"""T5's relative positions on a CPU, as a function of scores and as an array of biases: python -m benchmarks.functions

CPU seconds, the least of some runs, in turns; and the temporary memory of the compiled programs.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import mqa_jax
from mqa_jax import functions

HEADS, KV_HEADS, FEATURES, BUCKETS = 8, 2, 64, 32


def without(query: Array, key: Array, value: Array, table: Array, **options: Any) -> Array:
    return mqa_jax.dot_product_attention(query, key, value, is_causal=True, implementation="xla", **options)


def by_function(query: Array, key: Array, value: Array, table: Array) -> Array:
    return without(query, key, value, table, score_fn=(functions.t5_causal, table))


def by_bias(query: Array, key: Array, value: Array, table: Array) -> Array:
    positions, heads = jnp.arange(query.shape[1]), jnp.arange(HEADS)[:, None, None]
    zero = jnp.zeros((), query.dtype)
    bias = functions.t5_causal(zero, zero, heads, positions[:, None], positions[None], table)
    return without(query, key, value, table, bias=bias)


WAYS = {"without": without, "score_fn": by_function, "bias": by_bias}


def gradients(way: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    return jax.grad(lambda *arrays: jnp.sum(way(*arrays) ** 2), argnums=(0, 1, 2, 3))


def measured(direction: str, length: int, runs: int) -> dict[str, tuple[float, float]]:
    """CPU seconds and MiB of each way."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    shapes = (1, length, HEADS, FEATURES), *[(1, length, KV_HEADS, FEATURES)] * 2, (BUCKETS, HEADS)
    arrays = [normal(*shape) for shape in shapes]
    programs = {
        name: jax.jit(gradients(way) if direction == "with gradients" else way).lower(*arrays).compile()
        for name, way in WAYS.items()
    }
    seconds = dict.fromkeys(WAYS, float("inf"))
    for _ in range(runs):
        for name, program in programs.items():
            start = time.process_time()
            jax.block_until_ready(program(*arrays))
            seconds[name] = min(seconds[name], time.process_time() - start)
    memory: dict[str, Any] = {name: program.memory_analysis() for name, program in programs.items()}
    return {name: (seconds[name], memory[name].temp_size_in_bytes / 2**20) for name in WAYS}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args(arguments)
    for direction in ("forward", "with gradients"):
        found = measured(direction, chosen.length, chosen.runs)
        for name, (seconds, memory) in found.items():
            print(f"{direction:15} {name:9} {seconds:8.3f} CPU s {memory:9.1f} MiB")
        ratios = [array / function for array, function in zip(found["bias"], found["score_fn"])]
        print(f"{direction:15} bias / score_fn: {ratios[0]:.2f} times the time, {ratios[1]:.0f} times the memory")


if __name__ == "__main__":
    main()
