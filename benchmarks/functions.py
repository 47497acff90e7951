"""T5's relative positions on a CPU, as a function of scores and as a bias: python -m benchmarks.functions"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import mqa_jax
from benchmarks import cpu_seconds
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args(arguments)
    cpu_seconds.print_header("benchmarks.functions", f"--length {chosen.length} --runs {chosen.runs}")
    keys = 1, chosen.length, KV_HEADS, FEATURES
    arrays = cpu_seconds.normal((1, chosen.length, HEADS, FEATURES), keys, keys, (BUCKETS, HEADS))
    for direction in ("forward", "with gradients"):
        ways = WAYS if direction == "forward" else {name: gradients(way) for name, way in WAYS.items()}
        found = cpu_seconds.measured(ways, arrays, chosen.runs)
        for name, cost in found.items():
            print(f"{direction:15} {name:9} {cost}")
        ratios = [array / function for array, function in zip(found["bias"], found["score_fn"])]
        print(f"{direction:15} bias / score_fn: {ratios[0]:.2f} times the time, {ratios[1]:.0f} times the memory")


if __name__ == "__main__":
    main()
