"""Attention by us and by others, each made from the same random numbers.

A peer is a function from a problem to a `Candidate`. Torch is imported where it is used: it may be absent.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import mqa_jax
from benchmarks import environment, timing

Attend = Callable[..., Array]  # query, key, value, is_causal


class Candidate(NamedTuple):
    """A peer that is ready to run.

    Attributes:
      outputs: what is compared with the reference, before anything is measured.
      cost: one turn of the measurement, given `Settings.turn_seconds`: seconds or bytes, less is better.
    """

    outputs: Callable[[], list[np.ndarray]]
    cost: Callable[[float], float]


class NotApplicable(Exception):
    """Why a peer has nothing to do with a problem."""


@dataclass(frozen=True)
class Attention:
    """One call of attention in float32; the letters are those of `mqa_jax.shapes`.

    Attributes: gradients, whether the gradients of sum(weights * output) for query, key and value are computed too.
    """

    batch: int  # B
    queries: int  # T
    keys: int  # S
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    is_causal: bool = False
    gradients: bool = False

    def __str__(self) -> str:
        sizes = f"B={self.batch} T={self.queries} S={self.keys} N={self.heads} K={self.kv_heads} H={self.head_dim}"
        return f"{sizes} causal" if self.is_causal else sizes

    def small(self, factor: int = 32) -> "Attention":
        """The same on fewer tokens."""
        return replace(self, queries=-(-self.queries // factor), keys=-(-self.keys // factor))

    def shapes(self) -> list[tuple[int, ...]]:
        """Of query, key, value and the weights of the output."""
        query = (self.batch, self.queries, self.heads, self.head_dim)
        key = (self.batch, self.keys, self.kv_heads, self.head_dim)
        return [query, key, key, query]

    def arrays(self) -> list[Float[np.ndarray, "B tokens heads H"]]:
        rng = np.random.default_rng(0)
        return [rng.standard_normal(shape, dtype=np.float32) for shape in self.shapes()]


def ours(query: Array, key: Array, value: Array, is_causal: bool, implementation: str | None = None) -> Array:
    return mqa_jax.dot_product_attention(query, key, value, is_causal=is_causal, implementation=implementation)


def jax_nn(query: Array, key: Array, value: Array, is_causal: bool) -> Array:
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation="xla")


def jax_program(attend: Attend, problem: Attention) -> Any:  # what `jax.jit` returns
    """The output, and the gradients if the problem wants them."""
    attention = functools.partial(attend, is_causal=problem.is_causal)

    def program(query: Array, key: Array, value: Array, weights: Array) -> tuple[Array, ...]:
        if not problem.gradients:
            return (attention(query, key, value),)
        out, pull_back = jax.vjp(attention, query, key, value)
        return out, *pull_back(weights)

    return jax.jit(program)


def jax_outputs(attend: Attend, problem: Attention) -> list[np.ndarray]:
    return [np.asarray(array) for array in jax_program(attend, problem)(*problem.arrays())]


reference = functools.partial(jax_outputs, functools.partial(ours, implementation="reference"))


def jax_time(attend: Attend, problem: Attention) -> Candidate:
    """Costs seconds a call."""
    program, arrays = jax_program(attend, problem), [jnp.asarray(array) for array in problem.arrays()]
    run = lambda: jax.block_until_ready(program(*arrays))
    return Candidate(lambda: [np.asarray(array) for array in run()], functools.partial(timing.seconds_per_call, run))


def jax_temporaries(attend: Attend, problem: Attention) -> Candidate:
    """Costs bytes of temporaries. The problem is compiled for it, never run."""

    @functools.cache  # the same in every turn
    def temporaries(least: float) -> float:
        arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in problem.shapes()]
        return jax_program(attend, problem).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    return Candidate(functools.partial(jax_outputs, attend, problem), temporaries)


def torch_results(attention: Any, gradients: bool, query: Any, key: Any, value: Any, weights: Any) -> tuple[Any, ...]:
    """The output, and the gradients if they are wanted."""
    import torch

    if not gradients:
        with torch.inference_mode():
            return (attention(query, key, value),)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


def torch_time(problem: Attention, same_layout: bool = False) -> Candidate:
    """Costs seconds a call of torch's SDPA, on its own layout `[B, N, T, H]`, or on ours seen through a transpose."""
    import torch

    torch.set_num_threads(environment.usable_cores())
    transposed = [torch.from_numpy(array).transpose(1, 2) for array in problem.arrays()]
    tensors = transposed if same_layout else [tensor.contiguous() for tensor in transposed]
    query, key, value, weights = tensors
    attention: Any = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=problem.is_causal, enable_gqa=True
    )

    run = functools.partial(torch_results, attention, problem.gradients, query, key, value, weights)
    return Candidate(
        lambda: [tensor.transpose(1, 2).numpy() for tensor in run()], functools.partial(timing.seconds_per_call, run)
    )
