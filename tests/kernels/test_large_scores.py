"""Scores so large that one float32 cannot hold the log-sum-exp with enough digits: what is saved has two parts."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

LOWEST = float(jnp.finfo(jnp.bfloat16).min)  # a number of both dtypes
SHAPE: dict[str, Any] = dict(batch=(1,), heads=4, kv_heads=2, features=80)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["xla", "kernels"])
@pytest.mark.parametrize(("rows", "columns"), [(37, 203), (1, 1301), (3, 1301)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_rows_whose_bias_is_the_lowest_number_everywhere(implementation, rows, columns, dtype):
    """All keys are equally likely there, in the gradients as in the output, and where parts of the keys are merged."""
    bias = np.zeros((1, 1, rows, columns), np.float32)
    bias[:, :, :: max(1, rows // 5)] = LOWEST
    sinks = jnp.asarray([LOWEST, 0.0, -jnp.inf, 1.0])
    problem = oracle.random_problem(
        np.random.default_rng(0), rows=rows, columns=columns, bias=jnp.asarray(bias), sinks=sinks, **SHAPE
    ).astype(dtype)
    exact = problem.astype(jnp.float32)
    judge = (
        oracle.judge_float32
        if dtype == jnp.float32
        else lambda fast, expected: oracle.judge(fast, oracle.plain_results(problem), expected)
    )
    judge(oracle.results(problem, implementation), oracle.results(exact, "reference"))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["xla", "kernels"])
@pytest.mark.parametrize("scale", [8.0, 7.3])
def test_scores_of_some_hundreds(implementation, scale):
    problem = oracle.random_problem(np.random.default_rng(0), rows=61, columns=203, scale=scale, **SHAPE)
    expected = oracle.results(problem, "reference")
    oracle.judge(oracle.results(problem, implementation), oracle.plain_results(problem), expected)
