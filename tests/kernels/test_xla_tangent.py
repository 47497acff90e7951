"""The tangents of output and log-sum-exp in plain XLA, against the reference in float64 that JAX differentiates."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import forced_tiles
import jax
import jax.numpy as jnp
import numpy as np
import option_space
import oracle
import problems
import pytest
import tangents
from test_every_pair_of_options import rows_of
from ways import WAYS, Way

import mqa_jax
from mqa_jax.kernels.xla.tile import TileShape

SOURCES = ("query", "key", "value", "bias", "alibi_slopes", "sinks")
SMALL: dict[str, Any] = dict(rows=37, columns=67, heads=4, kv_heads=2, features=24, value_features=20)
SMALL_TILES = {"CPUs": TileShape(8, 16, 1, upcast=True), "accelerators": TileShape(16, 13, 2, upcast=False)}


def everything() -> oracle.Problem:
    """Every term of a score; NaN in all padding; in the first batch row five queries that see no key."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    problem = oracle.random_problem(
        rng,
        **SMALL,
        is_causal=True,
        query_offset=jnp.array([-5, 20], jnp.int32),
        query_seq_lengths=jnp.array([37, 28], jnp.int32),
        key_value_seq_lengths=jnp.array([47, 67], jnp.int32),
        bias=normal(2, 1, 37, 67),
        alibi_slopes=normal(4) / 8,
        sinks=normal(4),
        scale=0.5,
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )
    return replace(problem, arrays=option_space.spoilt(problem.arrays, problem.options))


@functools.cache
def expected_of_everything() -> Any:
    problem = everything()
    moving = tangents.random_tangents(problem)
    return problem, moving, tangents.expected(problem, moving)


def test_everything_at_once():
    """In several tiles on each axis, some of them full. `mutants` runs it, too."""
    problem, moving, expected = expected_of_everything()
    for shape in SMALL_TILES.values():
        with forced_tiles.registered(forced_tiles.plain_xla(shape)) as name:
            oracle.judge(tangents.of_implementation(problem, name)(problem, moving), *expected)


@pytest.mark.parametrize(("dtype", "sizes"), problems.FOR_PRECISION_IN_DTYPES, ids=str)
def test_precision(dtype, sizes):
    """At most twice the error of a plain computation in the same dtype."""
    problem = oracle.random_problem(np.random.default_rng(0), **sizes).astype(dtype)
    moving = tangents.random_tangents(problem)
    expected = tangents.expected(problem, moving)
    for shape in (TileShape(16, 48, 1, upcast=True), TileShape(16, 48, 1, upcast=False)):
        with forced_tiles.registered(forced_tiles.plain_xla(shape)) as name:
            oracle.judge(tangents.of_implementation(problem, name)(problem, moving), *expected)


# -- every pair of options --------------------------------------------------------------------------------------------


def judge(way: Way, row: Any) -> None:
    several = way.problems(row)
    with way.registered(row["tiles"]) as name:
        compute, exact = tangents.of_implementation(several[0], name), tangents.of_reference(several[0])
        for number, problem in enumerate(several):
            moving = tangents.random_tangents(problem, seed=number)
            oracle.judge_float32(compute(problem, moving), exact(problem, moving), way.factor)


def rows_with_derivatives(way: str) -> list[Any]:
    """Keys and values in 8 bits have none."""
    return [row for row in rows_of(WAYS[way]) if "bits" not in row.values[0]]


@pytest.mark.parametrize("row", rows_with_derivatives("xla"))
def test_every_pair_of_options(row):
    judge(WAYS["xla"], row)


@pytest.mark.parametrize("row", rows_with_derivatives("xla, few queries"))
def test_few_queries(row):
    judge(WAYS["xla, few queries"], row)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["xla, tiles of CPUs", "xla, tiles of accelerators"])
def test_tiles_of_platforms(way):
    """Rows of the table of options; the tiles' size is what is new."""
    for row in WAYS[way].table[::9]:
        judge(WAYS[way], row)


# -- operands whose tangent is 0 --------------------------------------------------------------------------------------


def subsets() -> list[tuple[str, ...]]:
    """Each operand alone, all but each, and those of the weights or the values."""
    alone = [(name,) for name in SOURCES]
    others = [tuple(other for other in SOURCES if other != name) for name in SOURCES]
    return [*alone, *others, ("query", "key"), ("key", "value")]


@pytest.mark.parametrize("names", subsets(), ids=",".join)
def test_operands_without_tangent(names):
    problem = everything()
    moving = tangents.random_tangents(problem, names)
    with forced_tiles.registered(forced_tiles.plain_xla(SMALL_TILES["CPUs"])) as name:
        oracle.judge(tangents.of_implementation(problem, name)(problem, moving), *tangents.expected(problem, moving))


@pytest.mark.parametrize(
    ("names", "products"),
    [
        (("query", "key", "value"), 4),  # one of them has the features of two
        (("query", "key"), 3),
        (("query",), 3),
        (("key",), 3),
        (("value",), 2),
        (("bias",), 2),
        (("sinks",), 0),
    ],
)
def test_a_product_with_what_does_not_move_is_left_out(names, products):
    """In each tile; without mask there is one loop."""
    rng = np.random.default_rng(0)
    sizes: Any = dict(rows=32, columns=32, heads=1, kv_heads=1, features=16)
    problem = oracle.random_problem(rng, **sizes, bias=jnp.ones((1, 1, 32, 32)), sinks=jnp.ones(1))
    both = tangents.moved(problem.arrays, tangents.random_tangents(problem, names), {})
    kernels = forced_tiles.plain_xla(TileShape(16, 16, 1, upcast=True))
    out, normalizer = kernels.forward(both.inputs)
    program = jax.jit(kernels.tangent).lower(both.inputs, out, normalizer, both.tangents).as_text()
    assert program.count("stablehlo.dot_general") == products


# -- what a tangent is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", SMALL_TILES)
def test_it_is_the_transpose_of_the_backward_pass(tiles):
    """<cotangents, tangents of the results> is <gradients, tangents of the operands>, in float32 but for rounding."""
    problem = everything()
    moving = tangents.random_tangents(problem)
    with forced_tiles.registered(forced_tiles.plain_xla(SMALL_TILES[tiles])) as name:
        found = tangents.of_implementation(problem, name)(problem, moving)
        results = oracle.results(problem, name)
    products = lambda pairs: [np.float64(x) * np.float64(y) for x, y in pairs]
    forwards = products(zip((found["out"], found["log_sum_exp"]), problem.cotangents))
    # Of padding no gradient and no cotangent counts, and the tangents of padding are NaN.
    backwards = products((results[f"d_{name}"], jnp.nan_to_num(x)) for name, x in moving.items())
    total = lambda terms: sum(x.sum() for x in terms)
    largest = max(sum(np.abs(x).sum() for x in terms) for terms in (forwards, backwards))
    assert abs(total(forwards) - total(backwards)) < 8 * np.finfo(np.float32).eps * largest
    assert abs(total(forwards)) > 1e-3 * largest  # else nothing is compared


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_that_attend_to_no_key(with_sinks):
    """Their output does not move; their log-sum-exp moves with the sink alone. Padding has no sink."""
    problem = everything()
    if not with_sinks:
        problem = replace(problem, arrays={name: x for name, x in problem.arrays.items() if name != "sinks"})
    moving = tangents.random_tangents(problem)
    with forced_tiles.registered(forced_tiles.plain_xla(SMALL_TILES["CPUs"])) as name:
        found = tangents.of_implementation(problem, name)(problem, moving)
    assert all((x[1, 28:] == 0).all() for x in found.values())
    assert (found["out"][0, :5] == 0).all()
    expected = jnp.broadcast_to(moving["sinks"], (5, 4)) if with_sinks else jnp.zeros((5, 4))
    np.testing.assert_allclose(found["log_sum_exp"][0, :5], expected, rtol=1e-6)
    assert (found["out"][0, 5:] != 0).any(axis=(1, 2)).all()  # a head may have dropped the only key that it sees


def test_hidden_keys_may_hold_anything():
    """A key that no query may attend to, the bias of its pairs, and the tangents of both. `mutants` runs it, too."""
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.standard_normal((1, 1, 13, 11), dtype=np.float32))
    problem = oracle.random_problem(rng, rows=13, columns=11, heads=4, kv_heads=2, features=8, bias=bias)
    problem = replace(problem, options={"mask": jnp.arange(11) != 5})
    moving = tangents.random_tangents(problem)
    spoil = lambda x: x | {"key": x["key"].at[:, 5].set(jnp.nan), "bias": x["bias"].at[..., 5].set(jnp.nan)}
    with forced_tiles.registered(forced_tiles.plain_xla(TileShape(8, 8, 1, upcast=True))) as name:
        compute = tangents.of_implementation(problem, name)
        right = compute(problem, moving)
        found = compute(replace(problem, arrays=spoil(problem.arrays)), spoil(moving))
    jax.tree.map(np.testing.assert_array_equal, found, right)


# -- memory and work --------------------------------------------------------------------------------------------------


def compiled_jvp(length: int) -> Any:
    attend: Callable = functools.partial(mqa_jax.dot_product_attention, is_causal=True, implementation="xla")
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (8, 1, 1)]
    return jax.jit(lambda *arrays: jax.jvp(attend, arrays[:3], arrays[3:])).lower(*shapes, *shapes).compile()


def test_memory_is_linear_in_length():
    """Scores of one head alone would be 64 MiB at 4096."""
    memory = [compiled_jvp(length).memory_analysis().temp_size_in_bytes for length in (4096, 8192)]
    assert memory[1] < 2.2 * memory[0]
    assert memory[0] < 2**26


def test_tiles_that_the_mask_empties_are_not_computed(monkeypatch):
    """A window of 64 over 1024 keys; counted as the loops run."""
    from mqa_jax.kernels.xla import tangent

    visits: list[int] = []
    add_tile = tangent.add_tile

    def counted(*arguments: Any) -> Any:
        jax.debug.callback(lambda: visits.append(1))
        return add_tile(*arguments)

    monkeypatch.setattr(tangent, "add_tile", counted)
    rng = np.random.default_rng(0)
    problem = oracle.random_problem(rng, batch=(1,), rows=1024, columns=1024, heads=1, kv_heads=1, features=8)
    problem = replace(problem, options=dict(is_causal=True, local_window_size=(64, 0)))
    both = tangents.moved(problem.arrays, tangents.random_tangents(problem), problem.options)
    kernels = forced_tiles.plain_xla(TileShape(128, 128, 1, upcast=True))
    out, normalizer = kernels.forward(both.inputs)
    jax.block_until_ready(jax.jit(kernels.tangent)(both.inputs, out, normalizer, both.tangents))
    jax.effects_barrier()
    assert len(visits) == 8 + 7  # the diagonal tile, and the one before it for all but the first
