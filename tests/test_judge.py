"""The rule that judges kernels must itself be able to say no: a deliberately broken kernel fails it."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

SHAPE: dict[str, Any] = dict(rows=67, columns=67, heads=4, kv_heads=2, features=32)


def _last_key_forgotten(results, problem):
    shorter = {name: x[..., :-1, :, :] if name in ("key", "value") else x for name, x in problem.arrays.items()}
    return oracle.plain_attention(shorter, {})[0]


BROKEN = {
    "mask off by one": lambda results, problem: jnp.roll(results["out"], 1, axis=-3),
    "scale off by 10%": lambda results, problem: oracle.plain_attention(problem.arrays, {"scale": 1.1 * 32**-0.5})[0],
    "sum off by 3%": lambda results, problem: results["out"] * 1.03,
    "one key forgotten": _last_key_forgotten,
    "one entry wrong": lambda results, problem: results["out"].at[1, 5, 2, 7].add(0.05),
    "not a number": lambda results, problem: results["out"].at[0, 0, 0, 0].set(jnp.nan),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_kernel_is_caught(fault, dtype):
    problem, fast, plain, expected = _computed(dtype)
    oracle.judge(fast, plain, expected)
    broken = fast | {"out": BROKEN[fault](fast, problem).astype(dtype)}
    with pytest.raises(AssertionError, match="out"):
        oracle.judge(broken, plain, expected)


@functools.cache
def _computed(dtype):
    problem = oracle.random_problem(np.random.default_rng(1), **SHAPE).astype(dtype)
    expected = oracle.results(problem.astype(jnp.float32), "reference")
    return problem, oracle.results(problem, "xla"), oracle.plain_results(problem), expected


def test_float32_needs_no_plain_result_to_be_strict():
    problem = oracle.random_problem(np.random.default_rng(1), **SHAPE)
    expected, fast = oracle.results(problem, "reference"), oracle.results(problem, "xla")
    oracle.judge_float32(fast, expected)
    fast["d_key"] = fast["d_key"] * (1 + 1e-4)
    with pytest.raises(AssertionError, match="d_key"):
        oracle.judge_float32(fast, expected)
