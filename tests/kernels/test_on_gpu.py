"""What only a GPU can show: python -m pytest --gpu. Full-size tiles, on the device, against the float32 reference."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest

import mqa_jax

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

SIZES: list[dict[str, Any]] = [
    dict(batch=(2,), rows=1031, columns=1031, heads=8, kv_heads=2, features=64, is_causal=True),
    dict(batch=(1,), rows=515, columns=2050, heads=32, kv_heads=1, features=128),
    dict(batch=(1,), rows=1031, columns=1031, heads=32, kv_heads=1, features=128, is_causal=True),
    dict(batch=(1,), rows=700, columns=700, heads=4, kv_heads=4, features=80, is_causal=True),
    dict(batch=(1,), rows=700, columns=700, heads=4, kv_heads=2, features=96, is_causal=True),
    dict(batch=(1,), rows=600, columns=600, heads=4, kv_heads=2, features=192, value_features=128, is_causal=True),
    dict(batch=(1,), rows=600, columns=600, heads=8, kv_heads=1, features=256, is_causal=True, logits_soft_cap=20.0),
    dict(batch=(1,), rows=1, columns=3001, heads=71, kv_heads=1, features=64),
]


DECODING: dict[str, Any] = dict(batch=(1,), rows=1, columns=32768, heads=32, kv_heads=1, features=128)


def name(sizes: dict[str, Any]) -> str:
    return "{rows}x{columns} {heads}/{kv_heads} {features}".format(**sizes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("sizes", SIZES, ids=name)
def test_precision_with_the_tiles_of_this_gpu(dtype, sizes):
    problem = oracle.random_problem(np.random.default_rng(0), **sizes).astype(dtype)
    with jax.default_matmul_precision("float32"):  # of XLA's own products: the reference, and the plain computation
        plain, reference = oracle.plain_results(problem), oracle.results(problem.astype(jnp.float32), "reference")
    oracle.judge(oracle.results(problem, "kernels"), plain, reference)


@pytest.mark.parametrize(
    ("dtype", "bits", "sizes"),
    [
        *problems.FOR_PRECISION_IN_8_BITS,
        *itertools.product([jnp.bfloat16, jnp.float16], ["int8", "float8_e4m3fn"], [DECODING]),
    ],
    ids=str,
)
def test_precision_of_8_bits(dtype, bits, sizes):
    with jax.default_matmul_precision("float32"):
        oracle.judge_8_bits(oracle.random_problem(np.random.default_rng(0), **sizes), dtype, bits, "kernels")


@pytest.mark.parametrize("bits", ["int8", "float8_e4m3fn"])
def test_a_step_on_a_ring_buffer(bits):
    """Two rows, before and after the end of the ring, as a module calls it."""
    lengths = jnp.array([700, 9000], jnp.int32)
    ring: dict[str, Any] = dict(key_value_ring_lengths=lengths, query_offset=lengths - 1, local_window_size=(1999, 0))
    problem = oracle.random_problem(
        np.random.default_rng(0), **{**DECODING, "batch": (2,), "columns": 2015}, is_causal=True, **ring
    )
    for stored in (problem, oracle.quantized(problem, bits)):
        with jax.default_matmul_precision("float32"):
            expected = oracle.outputs(stored, "reference")
        oracle.judge_float32(oracle.outputs(stored, "kernels"), expected)


def test_the_same_bits_twice():
    sizes: Any = dict(batch=(1,), rows=2048, columns=2048, heads=32, kv_heads=1, features=128, is_causal=True)
    problem = oracle.random_problem(np.random.default_rng(0), **sizes).astype(jnp.bfloat16)
    compute = oracle.program(problem, "kernels")
    first = compute(problem.arrays)
    for _ in range(5):
        for name, x in compute(problem.arrays).items():
            np.testing.assert_array_equal(x, first[name], err_msg=name)


def test_batch_rows_do_not_touch_each_other():
    """All tiles are ragged: what a program reads or writes beyond its own tail belongs to a neighbour."""
    sizes: Any = dict(batch=(3,), rows=33, columns=65, heads=3, kv_heads=1, features=40)
    problem = oracle.random_problem(np.random.default_rng(0), **sizes).astype(jnp.bfloat16)
    together = oracle.results(problem, "kernels")
    for row in range(3):
        cut = lambda x, row=row: x[row : row + 1]
        alone = oracle.Problem(jax.tree.map(cut, problem.arrays), cotangents=jax.tree.map(cut, problem.cotangents))
        for name, x in oracle.results(alone, "kernels").items():
            np.testing.assert_array_equal(x, cut(together[name]), err_msg=name)


def test_none_takes_the_kernels_here():
    query = jnp.ones((1, 64, 4, 64), jnp.bfloat16)
    text = jax.jit(mqa_jax.dot_product_attention).lower(query, query, query).as_text()
    assert "mqa_forward" in text
