"""The report of `train_lm.py`: text and speed of decoding with the cache, a table, and loss curves."""

import functools
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from llama import Llama, next_token

import mqa_jax

Params = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A trained model. Losses are nats per byte."""

    name: str
    kv_heads: int
    parameters: int
    losses: Float[np.ndarray, " steps"]
    held_out: float
    cache_bytes_per_token: int
    tokens_per_second: float
    sample: str


class Speed(NamedTuple):
    cache_bytes_per_token: int
    tokens_per_second: float


@functools.partial(jax.jit, static_argnames=("model", "max_length"))
def read(
    model: Llama, params: Params, prompt: Int[Array, "B T"], max_length: int
) -> tuple[Float[Array, "B vocabulary"], Any]:
    """Logits after the prompt, and a cache that holds it."""
    cache = mqa_jax.init_cache(model, prompt.shape[0], max_length, prompt)
    logits, changed = model.apply({"params": params, "cache": cache}, prompt, last_only=True, mutable=["cache"])
    return logits[:, -1], changed["cache"]


@functools.partial(jax.jit, static_argnames=("model", "count", "temperature"), donate_argnames="cache")
def write(
    model: Llama,
    params: Params,
    cache: Any,
    logits: Float[Array, "B vocabulary"],
    count: int,
    temperature: float,
    key: PRNGKeyArray,
) -> tuple[Int[Array, "B count"], Float[Array, "B vocabulary"], Any]:
    """Decodes `count` tokens of each row with the cache; returns them, and the logits and the cache after them.

    `logits` are those of the first token. Temperature 0 is greedy.
    """

    def turn(carry: tuple, key: PRNGKeyArray) -> tuple[tuple, Array]:
        logits, cache = carry
        token = next_token(logits, temperature, key)
        logits, changed = model.apply({"params": params, "cache": cache}, token[:, None], mutable=["cache"])
        return (logits[:, -1], changed["cache"]), token

    (logits, cache), tokens = lax.scan(turn, (logits, cache), jax.random.split(key, count))
    return tokens.T, logits, cache


def write_text(
    model: Llama, params: Params, prompt: Int[Array, "B T"], count: int, temperature: float, seed: int
) -> Int[Array, "B count"]:
    logits, cache = read(model, params, prompt, prompt.shape[1] + count)
    return write(model, params, cache, logits, count, temperature, jax.random.key(seed))[0]


def decode_speed(model: Llama, params: Params, rows: int, length: int, repeats: int = 3) -> Speed:
    """The speed of greedy decoding at the end of a cache of `length` positions; the fastest of the repeats.

    Only the cache's index says that it is almost full; reading its zeros takes as long as reading keys and values.
    """
    count = length // 32
    cache = mqa_jax.init_cache(model, rows, length, jnp.zeros((rows, 1), jnp.int32))
    cached = mqa_jax.cache_bytes(cache)
    start = length - count * (repeats + 1)
    cache = jax.tree.map(lambda x: jnp.full_like(x, start) if x.dtype == jnp.int32 else x, cache)  # cache_index
    logits, seconds = jnp.zeros((rows, model.config.vocabulary)), []
    for _ in range(repeats + 1):  # the first compiles
        before = time.perf_counter()
        _, logits, cache = jax.block_until_ready(write(model, params, cache, logits, count, 0.0, jax.random.key(0)))
        seconds.append(time.perf_counter() - before)
    return Speed(cached // (rows * length), rows * count / min(seconds[1:]))


def table(results: list[Result]) -> str:
    header = ["", "kv heads", "parameters", "train loss", "held-out loss", "cache bytes/token", "decode tokens/s"]
    rows = [
        [
            result.name,
            f"{result.kv_heads}",
            f"{result.parameters:,}",
            f"{smooth(result.losses)[-1]:.3f}",
            f"{result.held_out:.3f}",
            f"{result.cache_bytes_per_token:,}",
            f"{result.tokens_per_second:,.0f}",
        ]
        for result in results
    ]
    return f"{aligned([header, *rows])}\nLosses are nats per byte."


def aligned(rows: list[list[str]]) -> str:
    """A table with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def smooth(losses: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " fewer_steps"]:
    """The moving average of the losses over a twentieth of the run."""
    width = max(1, len(losses) // 20)
    return np.convolve(losses, np.full(width, 1 / width), "valid")


def save_plot(results: list[Result], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")  # not pyplot, which may need a display
    axes = figure.subplots()
    for result, marker in zip(results, itertools.cycle("os^Dv")):
        smoothed, steps = smooth(result.losses), len(result.losses)
        label = f"{result.name}, kv_heads={result.kv_heads}"
        (line,) = axes.plot(np.arange(steps - len(smoothed), steps) + 1, smoothed, label=f"{label}: training")
        held_out = f"{label}: held out {result.held_out:.3f}"
        axes.plot(steps, result.held_out, marker, color=line.get_color(), markerfacecolor="none", label=held_out)
    title = f"Loss in training, mean of {steps - len(smoothed) + 1} steps, and on held-out text"
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
