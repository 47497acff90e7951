"""What this machine does at best, and what share of that a measurement is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks import timing
from benchmarks.peers.jax_attention import precision_of
from benchmarks.timing import Settings

COPIES = 8
RATES = ("flops", "bandwidth", "matmul_share", "copy_share")


def measure_ceilings(settings: Settings, quick: bool) -> dict[str, Any]:
    """FLOP/s, by dtype, of a large product of matrices, 2 * size**3 / seconds; bytes a second of a copy.

    A copy of n bytes reads n and writes n: 2 * n / seconds. It is made COPIES times in one program: new memory, which
    the system of a CPU hands out page by page, is slower than memory itself. Of all turns the fastest counts.
    """
    on_gpu = jax.default_backend() == "gpu"
    size, floats = (256, 1 << 20) if quick else (8192, 1 << 28) if on_gpu else (2048, 1 << 26)
    numbers = jax.random.normal(jax.random.key(0), (2, size, size))  # zeros would need less power, and so be faster
    products = {}
    for dtype in ("bfloat16", "float16", "float32") if on_gpu or quick else ("float32",):
        with precision_of(dtype):
            products[dtype] = 2 * size**3 / least_seconds(jnp.matmul, numbers.astype(dtype), settings)
    array = jnp.zeros((1, floats), jnp.float32)
    copies = lambda x: jax.lax.fori_loop(0, COPIES, lambda number, x: x + 1, x)
    return {"matmul": products, "copy": 2 * COPIES * array.nbytes / least_seconds(copies, array, settings)}


def least_seconds(function: Callable[..., Array], arguments: Array, settings: Settings) -> float:
    program = jax.jit(function)
    run = functools.partial(program, *arguments)
    turns = range(settings.turns)
    return min(timing.seconds_per_call(run, settings.turn_seconds, jax.block_until_ready) for _ in turns)


def with_rates(row: dict[str, Any], problem: Any, ceilings: dict[str, Any]) -> dict[str, Any]:
    """A row, and how fast its peer works.

    flops: FLOP/s, `problem.flops` / cost. bandwidth: bytes a second, `problem.bytes` / cost. Both are those that the
    problem needs, not those that a peer spends. matmul_share, copy_share: of the ceilings. None where nothing was
    measured, a cost is no time, or a problem does not say what it needs.
    """
    rates: dict[str, float | None] = dict.fromkeys(RATES)
    if row["cost"] and row["unit"] == "ms" and hasattr(problem, "flops"):
        rates["flops"], rates["bandwidth"] = problem.flops / row["cost"], problem.bytes / row["cost"]
        product, copy = ceilings.get("matmul", {}).get(problem.dtype), ceilings.get("copy")
        rates["matmul_share"] = product and rates["flops"] / product
        rates["copy_share"] = copy and rates["bandwidth"] / copy
    return {**row, **rates}
