"""The tiled XLA kernels against the reference: all dtypes, every gradient. Options: `test_every_pair_of_options`."""

import functools
from dataclasses import replace
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from forced_tiles import tiled

import mqa_jax
from mqa_jax.inputs import Inputs, Operands, Sizes
from mqa_jax.kernels.xla import decode
from mqa_jax.kernels.xla import implementation as xla
from mqa_jax.kernels.xla.decode import forward_few_queries
from mqa_jax.kernels.xla.tile import TileShape
from mqa_jax.masks import Mask


@pytest.mark.slow
@hypothesis.given(problems.problems())
@hypothesis.settings(max_examples=6)
def test_every_combination_of_options_as_users_call_it(problem):
    oracle.judge_float32(oracle.results(problem, None), oracle.results(problem, "reference"))


@pytest.mark.parametrize(("dtype", "sizes"), problems.FOR_PRECISION_IN_DTYPES, ids=str)
def test_precision(monkeypatch, dtype, sizes):
    """In each dtype, at most twice the error of a plain computation in that dtype: output, LSE and gradients."""
    problem = oracle.random_problem(np.random.default_rng(0), **sizes).astype(dtype)
    plain, reference = oracle.plain_results(problem), oracle.results(problem.astype(jnp.float32), "reference")
    for upcast in (True, False):  # products as on CPUs, and as on accelerators
        fast = oracle.results(problem, tiled(monkeypatch, TileShape(min(32, sizes["rows"]), 64, 1, upcast)))
        oracle.judge(fast, plain, reference)


@pytest.mark.parametrize(("dtype", "bits", "sizes"), problems.FOR_PRECISION_IN_8_BITS, ids=str)
def test_precision_of_8_bits(monkeypatch, dtype, bits, sizes):
    problem = oracle.random_problem(np.random.default_rng(0), **sizes)
    for upcast in (True, False):
        shape = TileShape(min(16, sizes["rows"]), 64, 1, upcast)
        oracle.judge_8_bits(problem, dtype, bits, tiled(monkeypatch, shape))
    oracle.judge_8_bits(problem, dtype, bits, "xla")


def test_it_is_deterministic():
    problem = oracle.random_problem(
        np.random.default_rng(0), rows=300, columns=700, heads=4, kv_heads=2, features=16, is_causal=True
    )
    first, second = oracle.results(problem, "xla"), oracle.results(problem, "xla")
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "columns", "features", "dtype"),
    [
        (16, 1, 1, 515, 16, jnp.float32),
        (16, 4, 1, 512, 16, jnp.float32),
        (6, 2, 2, 515, 16, jnp.bfloat16),
        (12, 12, 1, 515, 16, jnp.bfloat16),
        (7, 7, 3, 509, 13, jnp.float32),  # no two features, and no two of all keys, in a vector
        (10, 5, 8, 3, 24, jnp.float32),  # fewer keys than a vector holds
    ],
)
def test_few_queries(heads, kv_heads, rows, columns, features, dtype):
    """The decoding step, which is another program, for rows of every length from none to all."""
    rng = np.random.default_rng(0)
    lengths = jnp.minimum(jnp.asarray([columns, 0, 1, 17, 300, columns - 1, 5, 250] * 2, jnp.int32), columns)
    problem = oracle.random_problem(
        rng,
        batch=(16,),
        rows=rows,
        columns=columns,
        features=features,
        value_features=8,
        key_value_seq_lengths=lengths,
        query_offset=jnp.maximum(lengths - rows, 0),
        is_causal=True,
        local_window_size=(200, 0),
        heads=heads,
        kv_heads=kv_heads,
        alibi_slopes=jnp.asarray(rng.random(heads), jnp.float32),
        sinks=jnp.asarray(rng.standard_normal(heads), jnp.float32),
        logits_soft_cap=3.0,
        bias=jnp.asarray(rng.standard_normal((1, heads, rows, columns)), jnp.float32),
        mask=jnp.asarray(rng.random((16, 1, 1, columns)) > 0.1),
        query_segment_ids=jnp.zeros((16, rows), jnp.int32),
        key_value_segment_ids=jnp.asarray(rng.random((16, columns)) > 0.9, jnp.int32),
        dropout_rate=0.2,
        dropout_rng=jax.random.key(3),
    ).astype(dtype)
    reference = oracle.results(problem.astype(jnp.float32), "reference")
    if dtype == jnp.float32:
        oracle.judge_float32(oracle.results(problem, "xla"), reference)
    else:
        oracle.judge(oracle.results(problem, "xla"), oracle.results(problem, "reference"), reference)


def test_few_queries_on_blocks_that_all_rows_see():
    """Which are computed without a mask: only padded queries see nothing."""
    lengths = jnp.array([1100, 1013, 1099, 1050], jnp.int32)
    problem = oracle.random_problem(
        np.random.default_rng(0),
        batch=(4,),
        rows=3,
        columns=1100,
        heads=8,
        kv_heads=4,
        features=16,
        key_value_seq_lengths=lengths,
        query_seq_lengths=jnp.array([3, 1, 2, 2], jnp.int32),
        query_offset=lengths - 3,
        is_causal=True,
        alibi_slopes=mqa_jax.alibi_slopes(8),
    )
    assert xla.steps_for_cpu(Sizes(B=4, T=3, S=1100, N=8, K=4, G=2, H=16, V=16)).columns < 1013 / 2
    oracle.judge_float32(oracle.outputs(problem, "xla"), oracle.outputs(problem, "reference"))


def _ints(*numbers):
    return jnp.asarray(numbers, jnp.int32)


REACHES = {  # of two rows with 500 keys in blocks of 64: the blocks that one of them can see
    "everything": (Mask(), range(8)),
    "lengths": (Mask(key_lengths=_ints(70, 0)), range(2)),
    "no length": (Mask(key_lengths=_ints(0, 0)), range(0)),
    "causal": (Mask(query_offset=_ints(5, 100), is_causal=True), range(2)),
    "window": (Mask(query_offset=_ints(300, 400), window=(64, 3)), range(3, 7)),
    "window, and a row without keys": (
        Mask(query_offset=_ints(399, 0), key_lengths=_ints(400, 0), window=(64, 0)),
        range(5, 7),
    ),
    "segments": (Mask(query_segments=_ints([1], [2]), key_segments=_ints(range(500), range(500)) // 100), range(1, 5)),
}


@pytest.mark.parametrize("reach", REACHES)
def test_one_query_reads_only_the_blocks_that_some_row_can_see(monkeypatch, reach):
    """Blocks are counted as the loop runs; and elsewhere lies NaN, which 0 * NaN would tell of."""
    mask, blocks = REACHES[reach]
    problem = oracle.random_problem(np.random.default_rng(0), rows=1, columns=500, heads=2, kv_heads=2, features=8)
    seen = np.isin(np.arange(500) // 64, blocks)[:, None, None]
    spoilt = {name: jnp.where(seen, problem.arrays[name], jnp.nan) for name in ("key", "value")}
    inputs = Inputs(Operands(**problem.arrays | spoilt), mask)
    steps = replace(xla.steps_for_cpu(inputs.sizes), columns=64)
    visits, attend = [], decode.attend

    def counted(*arguments):
        jax.debug.callback(lambda: visits.append(1))
        return attend(*arguments)

    monkeypatch.setattr(decode, "attend", counted)
    out, normalizer = jax.jit(functools.partial(forward_few_queries, steps=steps))(inputs)
    jax.effects_barrier()
    assert len(visits) == len(blocks)
    assert not jnp.isnan(out).any()
    assert jnp.isneginf(normalizer.log_sum_exp).all() == (not blocks)


@pytest.mark.parametrize("lengths", [None, (4096,) * 8], ids=["all keys", "lengths"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_one_query_copies_no_more_than_a_block_of_the_cache(dtype, lengths):
    """XLA would like to convert all of it to float32 before the loop."""
    size = Sizes(B=8, T=1, S=4096, N=16, K=16, G=1, H=64, V=64)
    cache = jax.ShapeDtypeStruct((size.B, size.S, size.K, size.H), dtype)
    query = jax.ShapeDtypeStruct((size.B, size.T, size.N, size.H), dtype)
    mask = Mask(key_lengths=None if lengths is None else jnp.asarray(lengths, jnp.int32))
    attend = jax.jit(lambda *arrays: xla.forward(Inputs(Operands(*arrays), mask)))
    memory: Any = attend.lower(query, cache, cache).compile().memory_analysis()
    block = size.B * xla.steps_for_cpu(size).columns * size.K * size.H * 4
    assert memory.temp_size_in_bytes < block / 2


NAN_OPTIONS: dict[str, dict[str, Any]] = {
    "tiles": dict(batch=(2,), rows=37, columns=53),
    "one query": dict(batch=(8,), rows=1, columns=53),
    "few queries": dict(batch=(2,), rows=3, columns=53),
}


@pytest.mark.parametrize("shape", NAN_OPTIONS)
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["xla", "reference", "kernels"])
def test_padding_never_reaches_a_result(implementation, shape):
    """Whatever lies beyond the lengths, outputs and gradients are those with zeros there."""
    sizes = NAN_OPTIONS[shape]
    lengths = jnp.asarray(np.arange(sizes["batch"][0]) * 7 + 30, jnp.int32) % sizes["columns"]
    problem = oracle.random_problem(
        np.random.default_rng(0), heads=4, kv_heads=2, features=8, key_value_seq_lengths=lengths, **sizes
    )
    padding = (jnp.arange(sizes["columns"]) >= lengths[:, None])[..., None, None]

    def filled(value):
        padded = {name: jnp.where(padding, value, problem.arrays[name]) for name in ("key", "value")}
        return problem.arrays | padded

    compute = oracle.program(problem, implementation)
    clean = compute(filled(0.0))
    for rubbish in (np.nan, np.inf, -np.inf):
        for name, x in compute(filled(rubbish)).items():
            np.testing.assert_array_equal(x, clean[name], err_msg=f"{name} with {rubbish} in the padding")


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["xla", "reference", "kernels"])
def test_a_masked_key_may_hold_anything(implementation, rows):
    problem = oracle.random_problem(
        np.random.default_rng(0), batch=(8,), rows=rows, columns=11, heads=4, kv_heads=2, features=8
    )
    mask = jnp.arange(11) != 5
    attend = functools.partial(mqa_jax.dot_product_attention, mask=mask, implementation=implementation)
    spoilt = problem.arrays | {"key": problem.arrays["key"].at[:, 5].set(jnp.nan)}
    np.testing.assert_array_equal(attend(**spoilt), attend(**problem.arrays))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["xla", "reference", "kernels"])
@pytest.mark.parametrize(("batch", "rows", "columns"), [((2,), 0, 5), ((2,), 5, 0), ((0,), 5, 4), ((), 0, 0)])
def test_nothing_to_attend(implementation, batch, rows, columns):
    problem = oracle.random_problem(
        np.random.default_rng(0),
        batch=batch,
        rows=rows,
        columns=columns,
        heads=4,
        kv_heads=2,
        features=8,
        bias=jnp.zeros((4, 1, 1)),
        sinks=jnp.zeros(4),
    )
    results = oracle.results(problem, implementation)
    assert results["out"].shape == (*batch, rows, 4, 8)
    assert not results["out"].any()
    assert not results["log_sum_exp"].any()  # that of the sinks
    np.testing.assert_allclose(results["d_sinks"], np.sum(problem.cotangents[1], axis=range(len(batch) + 1)), rtol=1e-5)
    assert all(not results[f"d_{name}"].any() for name in problem.arrays if name != "sinks")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["xla", "reference", "kernels"])
def test_a_bias_of_the_lowest_number_is_not_a_mask(implementation):
    """finfo.min everywhere leaves all keys equally likely, as in torch; -inf everywhere leaves none."""
    problem = oracle.random_problem(np.random.default_rng(0), rows=3, columns=5, heads=2, kv_heads=1, features=8)
    attend = functools.partial(mqa_jax.dot_product_attention, **problem.arrays, implementation=implementation)
    mean = jnp.broadcast_to(problem.arrays["value"].mean(-3, keepdims=True), (2, 3, 2, 8))
    lowest = jnp.full((1, 1, 1), jnp.finfo(jnp.float32).min)
    np.testing.assert_allclose(attend(bias=lowest), mean, atol=1e-6)
    np.testing.assert_allclose(attend(bias=lowest, logits_soft_cap=2.0), mean, atol=1e-6)
    assert not attend(bias=jnp.full((1, 1, 1), -jnp.inf)).any()
