"""Functions of scores and masks: the ready-made ones in every implementation, transformations, caches.

Together with every other option they are in the table of `test_every_pair_of_options`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import ways
from ready_made import READY, B, K, N, T, normal, problem

import mqa_jax
from mqa_jax import functions

SMALL: dict[str, Any] = {
    "xla": functools.partial(ways.small_tiles, (8, 16, 1, True)),
    "xla, other tiles": functools.partial(ways.small_tiles, (13, 11, 2, False)),
    "xla, few queries": functools.partial(ways.blocks, (13, True)),
    "triton": functools.partial(ways.triton, (16, 32, 256, True, 64)),
    "triton, few queries": functools.partial(ways.triton, (16, 16, 16, False, 64), most_queries=16),
}


@pytest.mark.parametrize("way", SMALL)
@pytest.mark.parametrize("name", READY)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_ready_made(name, way, dtype):
    """Output, log-sum-exp and all gradients, those of the function's arrays included."""
    of = problem(READY[name], rows=3 if "few" in way else T).astype(dtype)
    with SMALL[way]() as implementation:
        found = oracle.results(of, implementation)
    assert ("d_score_fn[1]" in found) == ("score_fn" in READY[name])
    oracle.judge(found, oracle.plain_results(of), oracle.results(of.astype("float32"), "reference"))


def drawn(name: str) -> list[str]:
    """The rows of the grid in a docstring."""
    text = getattr(functions, name).__doc__
    return [line.strip() for line in text.splitlines() if line.strip() and set(line) <= set("01 ")]


@pytest.mark.parametrize(
    ("name", "arrays"),
    [
        ("prefix", [[3]]),
        ("documents", [[[0, 0, 1, 1, 1]]]),
        ("dilated", [2]),
        ("neighbourhood", [3, 1]),
        ("sink_and_window", [1, 2]),
        ("tree", [[2], np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)]),
    ],
)
def test_masks_are_as_they_are_drawn(name, arrays):
    rows = drawn(name)
    start = 2 if name == "tree" else 0
    positions = jnp.arange(start, start + len(rows))[:, None], jnp.arange(len(rows[0].split()))[None]
    found = getattr(functions, name)(jnp.int32(0), jnp.int32(0), *positions, *map(jnp.asarray, arrays))
    assert [" ".join(str(int(x)) for x in row) for row in found] == rows


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_has_the_buckets_of_transformers(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    query, key = np.meshgrid(np.arange(0, 900, 7), np.arange(0, 900, 3), indexing="ij")
    for buckets in (32, 64):
        right = t5.T5Attention._relative_position_bucket(
            torch.asarray(key - query), bidirectional, buckets, 128
        ).numpy()
        table = jnp.arange(buckets, dtype=jnp.float32)[:, None]
        function: Any = functions.t5 if bidirectional else functions.t5_causal
        found = function(jnp.zeros(key.shape), 0, 0, jnp.asarray(query), jnp.asarray(key), table)
        np.testing.assert_array_equal(found, right)


def test_gradients_under_vmap_remat_and_jit():
    of = problem(READY["t5"])
    attend = lambda query, table: mqa_jax.dot_product_attention(
        query, of.arrays["key"], of.arrays["value"], score_fn=(functions.t5, table)
    )
    gradient = jax.grad(lambda query, table: jnp.sum(attend(query, table) ** 2), argnums=(0, 1))
    query, table = of.arrays["query"], of.arrays["score_fn[1]"]
    right = gradient(query, table)
    remat = jax.grad(lambda query, table: jnp.sum(jax.checkpoint(attend)(query, table) ** 2), argnums=(0, 1))
    mapped = jax.vmap(gradient, (None, 0))(query, jnp.stack([table, 2 * table]))
    for found in (jax.jit(gradient)(query, table), remat(query, table), jax.tree.map(lambda x: x[0], mapped)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), found, right)


def test_a_function_is_traced_once_for_all_values_of_its_arrays():
    calls = []

    def counted(score, batch, head, query, key, factor):
        calls.append(1)
        return score * factor

    arrays = problem({}).arrays
    attend = jax.jit(lambda factor: mqa_jax.dot_product_attention(**arrays, score_fn=(counted, factor)))
    attend(jnp.float32(1))
    first = len(calls)
    attend(jnp.float32(2))
    assert len(calls) == first


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["xla", "kernels"])
def test_gradients_that_nobody_asks_for_are_not_computed(implementation):
    """The sums over all pairs for the arrays of a score function."""
    of = problem(READY["scaled"])

    def program(*names):
        def loss(wanted):
            given = oracle.arguments(of.arrays | wanted, of.options)
            return jnp.sum(mqa_jax.dot_product_attention(**given, implementation=implementation))

        gradient = jax.jit(jax.grad(loss)).lower({name: of.arrays[name] for name in names})
        return gradient.as_text().count("stablehlo.while")

    asked, unasked = program("query", "score_fn[1]"), program("query")
    assert (asked > unasked) == (implementation == "kernels"), f"{asked=}, {unasked=}"


@pytest.mark.parametrize("layout", ["static", "ring"])
def test_positions_go_on_in_a_cache(layout):
    table, window = normal(32, N), 12
    settings: dict[str, Any] = dict(dim=24, heads=N, kv_heads=K, local_window_size=(window, 0))
    module = mqa_jax.GroupedQueryAttention(**settings, cache_layout=layout)
    x = normal(B, 41, 24)
    options: dict[str, Any] = dict(
        score_fn=(functions.t5_causal, table), mask_fn=(functions.sink_and_window, 1, window // 2)
    )
    parameters = module.init(jax.random.key(0), x)["params"]
    whole, *_ = mqa_jax.GroupedQueryAttention(**settings).apply({"params": parameters}, x, **options)
    without, *_ = module.apply({"params": parameters}, x)
    assert np.abs(whole - without).max() > 0.01
    cache = mqa_jax.init_cache(module, B, 41, x)
    found = []
    for start, stop in [(0, 29), (29, 30), (30, 31), (31, 35), (35, 41)]:
        (out, *_), changed = module.apply(
            {"params": parameters, "cache": cache}, x[:, start:stop], mutable=["cache"], **options
        )
        cache = changed["cache"]
        found.append(out)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), whole, atol=2e-5)


def test_no_position_of_a_bias_key():
    module = mqa_jax.GroupedQueryAttention(dim=24, heads=N, add_bias_kv=True)
    with pytest.raises(NotImplementedError, match="add_bias_kv works without score_fn only"):
        module.init(jax.random.key(0), normal(B, 5, 24), score_fn=(functions.scaled, normal(N)))
