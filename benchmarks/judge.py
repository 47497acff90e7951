"""By how much numbers may be off: the rule of tests/oracle.py.

A result is compared with that of a plain computation in float32, and may differ by twice as much as a plain
computation in its own dtype does, and by some units in the last place.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.peers.jax_attention import KEPT, ours, plain_arrays, precision_of, program_of
from benchmarks.problems import Problem
from mqa_jax import reference
from mqa_jax.attention import inputs_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

FACTOR, LENIENCE = oracle.FACTOR, 2


def exact(problem: Problem) -> list[np.ndarray]:
    """The outputs in float32, for the numbers that the peers get."""
    return _exact(for_all_directions(problem))[: problem.results]


def allowed(peer: str, problem: Problem) -> list[float]:
    """By how much outputs may differ from `exact`. Dropout changes hardly anything about that."""
    return lenient(peer, _allowed(replace(for_all_directions(problem), dropout=0.0))[: problem.results])


def for_all_directions(problem: Problem) -> Problem:
    """One computation does for all; what continues a cache has no gradients."""
    return replace(problem, gradients=problem.gradients or not problem.continues)


def lenient(peer: str, errors: Sequence[float]) -> list[float]:
    """Others follow rules of their own, as FlashAttention, which allows its gradients half as much again.

    They are given LENIENCE times as much, which no wrong mask or head gets by with.
    """
    return list(errors) if peer.startswith("ours") else [LENIENCE * error for error in errors]


def bounds(plain: Sequence[np.ndarray], right: Sequence[np.ndarray], dtype: str) -> list[float]:
    """The rule, for the results of a plain computation in `dtype` and the right ones."""
    return [FACTOR * largest(x - y) + unit(dtype) * largest(y) for x, y in zip(plain, right, strict=True)]


def bounds_of_sums(plain: Sequence[np.ndarray], right: Sequence[np.ndarray], dtype: str) -> list[float]:
    """The same for results of which some are sums that cancel, as the gradients of the keys' biases do.

    They are as far off as what they are sums of, so the units are those of the largest of all results.
    """
    floor = unit(dtype) * max(map(largest, right))
    return [FACTOR * largest(x - y) + floor for x, y in zip(plain, right, strict=True)]


def largest(array: np.ndarray) -> float:
    return float(np.max(np.abs(array)))


def unit(dtype: str) -> float:
    return oracle.FLOOR_ULPS[dtype] * float(jnp.finfo(dtype).eps)


@functools.lru_cache(maxsize=KEPT)
def _exact(problem: Problem) -> list[np.ndarray]:
    program = jax.jit(program_of(functools.partial(ours, implementation="reference"), problem))
    return [np.asarray(x) for x in program(*plain_arrays(problem, jnp.float32))]


@functools.lru_cache(maxsize=KEPT)
def _allowed(problem: Problem) -> list[float]:
    with precision_of(problem.dtype):
        plain = jax.jit(program_of(plain_attention, problem))(*plain_arrays(problem, problem.dtype))
    return bounds([np.asarray(x.astype(jnp.float32)) for x in plain], _exact(problem), problem.dtype)


def plain_attention(problem: Problem, query: Array, key: Array, value: Array) -> Array:
    """The oracle's, which knows masks and ALiBi as a bias: the scores of a query that is 0."""
    inputs = inputs_of(jnp.zeros_like(query), key, value, **problem.options())
    bias = jax.lax.stop_gradient(reference.scores(inputs))
    out, _ = oracle.plain_attention({"query": query, "key": key, "value": value, "bias": bias}, {})
    return out
