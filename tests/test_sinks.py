"""Sinks in rows that see everything, nothing, or do not exist: the same as a key with value 0 that all rows see."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from forced_tiles import SMALL, tiled, use_tiles

import mqa_jax
from mqa_jax.kernels.triton import decode
from mqa_jax.kernels.xla.tile import TileShape

SINKS = jnp.asarray([0.5, -jnp.inf, 2.0, -30.0])
SLOPES = jnp.asarray([0.5, 0.25, 0.03, 0.0])
PLACES = {  # implementation, T, and the fewest keys of a split of `triton.decode`
    "reference": ("reference", 3, 128),
    "xla, few queries": ("xla", 3, 128),
    "xla, tiles": ("tiled", 19, 128),
    "triton, few queries": ("kernels", 3, 128),
    "triton, few queries in splits": ("kernels", 3, 8),
    "triton, tiles": ("kernels", 19, 128),
}


def problem(rows: int, columns: int = 37, **options: Any) -> oracle.Problem:
    sizes: Any = dict(batch=(3,), rows=rows, columns=columns, heads=4, kv_heads=2, features=8)
    return oracle.random_problem(np.random.default_rng(0), **sizes, **options)


def by_a_key(problem: oracle.Problem) -> dict[str, Any]:
    """Output, log-sum-exp and gradients where the sink is the bias of one more key, at index 0, whose value is 0."""
    arrays, options = dict(problem.arrays), dict(problem.options)
    sinks = arrays.pop("sinks")
    batch, rows, columns = arrays["query"].shape[0], arrays["query"].shape[1], arrays["key"].shape[1]
    bias = jnp.zeros((batch, 4, rows, columns + 1)).at[..., 0].set(sinks[:, None])
    arrays |= {name: jnp.pad(arrays[name], ((0, 0), (1, 0), (0, 0), (0, 0))) for name in ("key", "value")}
    visible = jnp.broadcast_to(options.pop("mask", jnp.ones((1, 1, 1, 1), bool)), (batch, 4, rows, columns))
    visible = jnp.concatenate([jnp.ones((batch, 4, rows, 1), bool), visible], axis=-1)
    options |= dict(mask=visible)
    found = oracle.results(oracle.Problem({**arrays, "bias": bias}, options, problem.cotangents), "reference")
    found["d_sinks"] = found.pop("d_bias")[..., 0].sum(axis=(0, 2))
    return found | {name: found[name][:, 1:] for name in ("d_key", "d_value")}


@pytest.fixture
def place(request, monkeypatch, kernels):
    implementation, rows, least_keys = PLACES[request.param]
    use_tiles(monkeypatch, **SMALL)
    tiled(monkeypatch, TileShape(rows=7, columns=9, heads=1, upcast=True))
    monkeypatch.setattr(decode, "MIN_KEYS", least_keys)
    return implementation, rows


everywhere = pytest.mark.parametrize("place", PLACES, indirect=True)


@everywhere
def test_a_sink_is_a_key_with_value_0(place):
    implementation, rows = place
    mask = jnp.asarray(np.random.default_rng(1).random((3, 4, rows, 37)) > 0.3)
    mask = mask.at[0, :, 0].set(False).at[1].set(False)  # a row that sees no key, and a batch row
    lengths = jnp.asarray([rows, rows - 1, rows - 2], jnp.int32)
    sinking = problem(rows, sinks=SINKS, mask=mask, query_seq_lengths=lengths)
    found = oracle.results(sinking, implementation)
    expected = by_a_key(sinking)
    oracle.judge_float32(found, expected)
    seen_by_none = found["log_sum_exp"][1, : rows - 1]
    np.testing.assert_allclose(seen_by_none, jnp.broadcast_to(SINKS, (rows - 1, 4)), rtol=1e-6)
    assert not found["out"][1].any()
    assert np.isneginf(found["log_sum_exp"][1, rows - 1]).all(), "a query that is padding has no sink"
    assert found["d_sinks"][3] == pytest.approx(expected["d_sinks"][3])


@everywhere
def test_a_sink_of_minus_infinity_is_none(place):
    implementation, rows = place
    options: Any = dict(query_seq_lengths=jnp.asarray([rows, 1, 0], jnp.int32), is_causal=True, query_offset=-1)
    without = problem(rows, **options)
    found = oracle.results(problem(rows, sinks=jnp.full(4, -jnp.inf), **options), implementation)
    assert not found.pop("d_sinks").any()
    oracle.judge_float32(found, oracle.results(without, "reference"))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["reference", "xla", "kernels"])
@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (19, 0), (0, 37), (0, 0)])
def test_no_keys_or_no_queries(implementation, rows, columns):
    sinking = problem(rows, columns, sinks=SINKS, query_seq_lengths=jnp.asarray([rows, rows // 2, 0], jnp.int32))
    found = oracle.results(sinking, implementation)
    oracle.judge_float32(found, by_a_key(sinking))
    if rows:
        np.testing.assert_array_equal(found["log_sum_exp"][0], jnp.broadcast_to(SINKS, (rows, 4)))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_parts_with_the_sink_in_one_of_them(implementation):
    """Also where a row sees no key of that part, or none at all; and the gradients through the merge."""
    whole = problem(3, sinks=SINKS, key_value_seq_lengths=jnp.asarray([37, 12, 0], jnp.int32))

    def merged(arrays, of_sinks):
        parts = []
        for number, (start, stop) in enumerate([(0, 13), (13, 20), (20, 37)]):
            part = {name: arrays[name][:, start:stop] for name in ("key", "value")}
            lengths = jnp.clip(whole.options["key_value_seq_lengths"] - start, 0, stop - start)
            result = mqa_jax.dot_product_attention(
                arrays["query"],
                **part,
                key_value_seq_lengths=lengths,
                sinks=arrays["sinks"] if number == of_sinks else None,
                implementation=implementation,
                return_residual=True,
            )
            parts.append(result)
        return mqa_jax.merge_partials(*(jnp.stack(x) for x in zip(*parts)))

    expected = oracle.results(whole, "reference")
    for of_sinks in range(3):
        attend = lambda arrays, options, of_sinks=of_sinks: merged(arrays, of_sinks)
        oracle.judge_float32(oracle.compiled(whole, attend)(whole), expected)


@everywhere
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_16_bits(place, dtype):
    """They err no more than twice as much as when plainly computed."""
    implementation, rows = place
    low = problem(rows, alibi_slopes=SLOPES, sinks=SINKS).astype(dtype)
    plain, reference = oracle.plain_results(low), oracle.results(low.astype(jnp.float32), "reference")
    oracle.judge(oracle.results(low, implementation), plain, reference)


@everywhere
def test_gradients_have_the_dtype_of_sinks_and_slopes(place):
    implementation, rows = place
    low = problem(rows, alibi_slopes=SLOPES, sinks=SINKS).astype(jnp.bfloat16)
    mixed = dataclasses.replace(low, arrays=low.arrays | {"sinks": SINKS, "alibi_slopes": SLOPES.astype(jnp.float16)})
    gradients = oracle.results(mixed, implementation)
    assert gradients["d_sinks"].dtype == jnp.float32
    assert gradients["d_alibi_slopes"].dtype == jnp.float16
    assert all(jax.tree.leaves(jax.tree.map(lambda x: bool(np.isfinite(np.float32(x)).all()), gradients)))
