"""What derivatives of attention cost on a CPU, beside the forward pass: python -m benchmarks.derivatives"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import mqa_jax
from benchmarks import cpu_seconds

BATCH, FEATURES = 1, 64


def ways(attend: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """Of arrays and their directions."""
    loss = lambda *arrays: jnp.sum(attend(*arrays) ** 2)
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    return {
        "forward": lambda *both: attend(*both[:3]),
        "jvp": lambda *both: jax.jvp(attend, both[:3], both[3:]),
        "grad": lambda *both: gradient(*both[:3]),
        "jvp of grad": lambda *both: jax.jvp(gradient, both[:3], both[3:]),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--heads", type=int, nargs=2, default=[8, 1], metavar=("N", "K"))
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args(arguments)
    heads, kv_heads = chosen.heads
    lengths = " ".join(map(str, chosen.lengths))
    options = f"--lengths {lengths} --heads {heads} {kv_heads} --runs {chosen.runs}"
    cpu_seconds.print_header("benchmarks.derivatives", options)
    ours: Callable[..., Array] = lambda *arrays: mqa_jax.dot_product_attention(*arrays, is_causal=True)
    textbook: Callable[..., Array] = lambda *arrays: jax.nn.dot_product_attention(*arrays, is_causal=True)
    for length in chosen.lengths:
        keys = BATCH, length, kv_heads, FEATURES
        arrays = cpu_seconds.normal(*[(BATCH, length, heads, FEATURES), keys, keys] * 2)
        for name, attend in {"mqa_jax": ours, "jax.nn": textbook}.items():
            found = cpu_seconds.measured(ways(attend), arrays, chosen.runs)
            for derivative, cost in found.items():
                ratio = cost.seconds / found["forward"].seconds
                print(f"{length:6} {name:8} {derivative:12} {cost} {ratio:6.2f} times the forward pass")


if __name__ == "__main__":
    main()
