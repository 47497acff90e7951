"""The Triton kernel of the tangents, in interpret mode, against the reference that JAX differentiates forwards."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import option_space
import oracle
import problems
import pytest
import tangents
from strict_gpu import strict_gpu
from test_every_pair_of_options import rows_of
from ways import WAYS

from mqa_jax.kernels.triton import implementation as triton

TILES = WAYS["triton"].structure["tiles"][0]
SMALL: dict[str, Any] = dict(rows=37, columns=67, heads=4, kv_heads=2, features=24, value_features=20)
SOURCES = ("query", "key", "value", "bias", "alibi_slopes", "sinks")


@pytest.fixture
def interpret(request) -> bool:
    """With --gpu compiled, on the GPU."""
    return not request.config.getoption("--gpu")


def everything(seed: int = 0, **sizes: Any) -> oracle.Problem:
    """Every term of a score, a mask that leaves some rows no key, and padding; two batch rows."""
    rng = np.random.default_rng(seed)
    size = SMALL | sizes
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    return oracle.random_problem(
        rng,
        **size,
        is_causal=True,
        query_offset=jnp.array([-5, 20], jnp.int32),
        query_seq_lengths=jnp.array([size["rows"], size["rows"] - 9], jnp.int32),
        key_value_seq_lengths=jnp.array([size["columns"] - 20, size["columns"]], jnp.int32),
        bias=normal(2, 1, size["rows"], size["columns"]),
        alibi_slopes=normal(size["heads"]) / 8,
        sinks=normal(size["heads"]),
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(seed),
    )


@functools.cache
def expected_of_everything() -> Any:
    problem = everything()
    problem = replace(problem, arrays=option_space.spoilt(problem.arrays, problem.options))
    moving = tangents.random_tangents(problem)
    return problem, moving, tangents.expected(problem, moving)


def test_everything_at_once():
    """In several tiles on each axis; NaN in all padding. `mutants` runs it, too."""
    problem, moving, expected = expected_of_everything()
    with WAYS["triton"].registered(TILES):
        oracle.judge(tangents.of_kernels(problem, interpret=True)(problem, moving), *expected)


@pytest.mark.parametrize(("dtype", "sizes"), problems.FOR_PRECISION_IN_DTYPES, ids=str)
def test_precision(dtype, sizes, interpret):
    """With the tiles of the table, at most twice the error of a plain computation in the same dtype."""
    tangents.judge(oracle.random_problem(np.random.default_rng(0), **sizes).astype(dtype), interpret=interpret)


def rows_of_the_kernel() -> list[Any]:
    """Keys and values in 8 bits have no derivatives; with a score_fn plain XLA computes them."""
    return [row for row in rows_of(WAYS["triton"]) if not ("bits" in row.values[0] or row.values[0]["score_fn"])]


@pytest.mark.parametrize("row", rows_of_the_kernel())
def test_every_pair_of_options(row, interpret):
    way = WAYS["triton"]
    several = way.problems(row)
    with way.registered(row["tiles"]):
        judged = [of(several[0]) for of in (lambda x: tangents.of_kernels(x, interpret), tangents.of_reference)]
        for number, problem in enumerate(several):
            moving = tangents.random_tangents(problem, seed=number)
            found, expected = (compute(problem, moving) for compute in judged)
            oracle.judge_float32(found, expected)


# -- operands whose tangent is 0 --------------------------------------------------------------------------------------


def subsets() -> list[tuple[str, ...]]:
    """Each operand alone, all but each, and those of the weights or the values."""
    alone = [(name,) for name in SOURCES]
    others = [tuple(other for other in SOURCES if other != name) for name in SOURCES]
    return [*alone, *others, ("query", "key"), ("key", "value")]


@pytest.mark.parametrize("names", subsets(), ids=",".join)
def test_operands_without_tangent(names, interpret):
    problem = everything()
    with WAYS["triton"].registered(TILES):
        tangents.judge(problem, tangents.random_tangents(problem, names), interpret)


@pytest.mark.parametrize(
    ("names", "products"),
    [
        (("query", "key", "value"), 5),
        (("query", "key"), 4),
        (("query",), 3),
        (("key",), 3),
        (("value",), 2),
        (("bias",), 2),
        (("key", "value"), 4),
    ],
)
def test_a_product_with_what_does_not_move_is_left_out(names, products):
    """In each tile; without mask there is one loop."""
    rng = np.random.default_rng(0)
    sizes: Any = dict(rows=32, columns=32, heads=1, kv_heads=1, features=16)
    problem = oracle.random_problem(rng, **sizes, bias=jnp.ones((1, 1, 32, 32)))
    both = tangents.moved(problem.arrays, tangents.random_tangents(problem, names), {})
    with WAYS["triton"].registered(TILES):
        out, normalizer = tangents.saved(both.inputs, interpret=True)
        program = jax.make_jaxpr(
            lambda both, out, normalizer: triton.tangent(both.inputs, out, normalizer, both.tangents, interpret=True)
        )
        assert str(program(both, out, normalizer)).count("dot_general") == products


# -- what a tangent is ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_the_transpose_of_the_backward_pass():
    """<cotangents, tangents of the results> is <gradients, tangents of the operands>, in float32 but for rounding."""
    problem = everything()
    both = tangents.moved(problem.arrays, tangents.random_tangents(problem), problem.options)
    padded = jax.tree.map(jnp.nan_to_num, both.tangents)
    with WAYS["triton"].registered(TILES):
        out, normalizer = tangents.saved(both.inputs, interpret=True)
        found = triton.tangent(both.inputs, out, normalizer, both.tangents, interpret=True)
        gradients = triton.backward(both.inputs, out, normalizer, *problem.cotangents, interpret=True)
    products = lambda these, those: [
        np.float64(x) * np.float64(y) for x, y in zip(*map(jax.tree.leaves, (these, those)))
    ]
    forwards, backwards = products(found, problem.cotangents), products(padded, gradients)
    total = lambda terms: sum(x.sum() for x in terms)
    largest = max(sum(np.abs(x).sum() for x in terms) for terms in (forwards, backwards))
    assert abs(total(forwards) - total(backwards)) < 8 * np.finfo(np.float32).eps * largest
    assert abs(total(forwards)) > 1e-3 * largest  # else nothing is compared


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_attend_to_no_key(with_sinks):
    """Their output does not move; their log-sum-exp moves with the sink alone."""
    problem = everything()
    if not with_sinks:
        arrays = {name: x for name, x in problem.arrays.items() if name != "sinks"}
        problem = replace(problem, arrays=arrays)
    moving = tangents.random_tangents(problem)
    with WAYS["triton"].registered(TILES):
        found = tangents.of_kernels(problem, True)(problem, moving)
    length = int(problem.options["query_seq_lengths"][1])
    for name in found:
        assert (found[name][1, length:] == 0).all()
    assert (found["out"][0, :5] == 0).all()
    expected = jnp.broadcast_to(moving["sinks"], (5, 4)) if with_sinks else jnp.zeros((5, 4))
    np.testing.assert_allclose(found["log_sum_exp"][0, :5], expected, rtol=1e-6)
    assert (found["out"][0, 15:] != 0).any(-1).all()


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_few_queries(rows, interpret):
    """The forward pass has another kernel for them."""
    problem = oracle.random_problem(
        np.random.default_rng(0),
        **SMALL | dict(rows=rows),
        is_causal=True,
        query_offset=jnp.array([50, 9], jnp.int32),
        sinks=jnp.ones(4),
    )
    tangents.judge(problem, interpret=interpret)


@pytest.mark.slow
def test_every_entry_read_exists_and_every_entry_of_a_result_is_written_once(monkeypatch):
    """On a strict model of a GPU's memory, see `strict_gpu`; interpret mode would hide it."""
    problem = everything(batch=(2,), rows=19, columns=35, heads=2, kv_heads=1)
    both = tangents.moved(problem.arrays, tangents.random_tangents(problem), problem.options)
    with WAYS["triton"].registered(TILES):
        saved = tangents.saved(both.inputs, interpret=True)
        expected = triton.tangent(both.inputs, *saved, both.tangents, interpret=True)
        with jax.disable_jit():
            ran = strict_gpu(monkeypatch)
            found = triton.tangent(both.inputs, *saved, both.tangents, interpret=True)
    assert ran == ["mqa_tangent"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, expected)
