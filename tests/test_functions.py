"""Functions of scores and masks: the ready-made ones in every implementation, caches, transformations, what is refused.

Together with every other option they are in the table of `test_every_pair_of_options`.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import ways

import mqa_jax
from mqa_jax import functions, masks
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import tile_bounds

T, S, B, N, K = 61, 83, 2, 4, 2
RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.standard_normal(shape, dtype=np.float32))
IDS = jnp.asarray(np.sort(RNG.integers(0, 5, (B, S)), axis=1), jnp.int32)
PARENTS = jnp.asarray(np.tril(RNG.random((T, T)) < 0.3) | np.eye(T, dtype=bool))

READY: dict[str, dict[str, Any]] = {
    "scaled": {"score_fn": functions.scaled, "score_fn[1]": 1 + normal(N) / 4},
    "t5": {"score_fn": functions.t5, "score_fn[1]": normal(32, N)},
    "t5 causal": {"score_fn": functions.t5_causal, "score_fn[1]": normal(32, N), "is_causal": True, "query_offset": 22},
    "prefix": {"mask_fn": functions.prefix, "mask_fn[1]": jnp.asarray([37, 0])},
    "documents": {"mask_fn": functions.documents, "mask_fn[1]": IDS},
    "dilated": {"mask_fn": functions.dilated, "mask_fn[1]": jnp.int32(7)},
    "neighbourhood": {"mask_fn": functions.neighbourhood, "mask_fn[1]": jnp.int32(11), "mask_fn[2]": jnp.int32(2)},
    "sink and window": {
        "mask_fn": functions.sink_and_window,
        "mask_fn[1]": jnp.int32(3),
        "mask_fn[2]": jnp.int32(13),
        "query_offset": 22,
    },
    "tree": {
        "mask_fn": functions.tree,
        "mask_fn[1]": jnp.asarray([19, 22]),
        "mask_fn[2]": PARENTS,
        "query_offset": jnp.asarray([19, 22]),
    },
}
SMALL: dict[str, Any] = {
    "xla": functools.partial(ways.small_tiles, (8, 16, 1, True)),
    "xla, other tiles": functools.partial(ways.small_tiles, (13, 11, 2, False)),
    "xla, few queries": functools.partial(ways.blocks, (13, True)),
    "triton": functools.partial(ways.triton, (16, 32, 256, True, 64)),
    "triton, few queries": functools.partial(ways.triton, (16, 16, 16, False, 64), most_queries=16),
}


def problem(options: dict[str, Any], rows: int = T, batch: tuple[int, ...] = (B,), **more: Any) -> oracle.Problem:
    sizes: dict[str, Any] = dict(rows=rows, columns=S, heads=N, kv_heads=K, features=8)
    return oracle.random_problem(np.random.default_rng(1), batch=batch, **sizes, **options, **more)


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


# -- what `batch` is --------------------------------------------------------------------------------------------------


def of_row(score, batch, head, query, key, table):
    return score + table[batch, key]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shared", [(2, 1), (1, 3), (2, 3)])
def test_rows_of_several_leading_axes_are_numbered_in_order(shared, implementation):
    """Also where a bias is shared along one of them, which is computed by `jax.vmap`."""
    table, bias = normal(6, S), normal(*shared, 1, T, S)
    attend = functools.partial(mqa_jax.dot_product_attention, implementation=implementation)
    arrays = problem({}, batch=(2, 3)).arrays
    added = table.reshape(2, 3, 1, 1, S)
    found = attend(**arrays, bias=bias, score_fn=(of_row, table))
    np.testing.assert_allclose(found, attend(**arrays, bias=bias + added), atol=2e-6)


def test_vmap_counts_the_rows_of_one_call():
    table, arrays = normal(6, S), problem({}, batch=(3, 2)).arrays
    query, key, value = arrays.values()
    attend = lambda q, k, v, *more: mqa_jax.dot_product_attention(q, k, v, *more)
    shared = jax.vmap(lambda q, k, v: mqa_jax.dot_product_attention(q, k, v, score_fn=(of_row, table)))
    bias = table[:2].reshape(2, 1, 1, S)
    np.testing.assert_allclose(
        shared(query, key, value), jax.vmap(attend, (0, 0, 0, None))(query, key, value, bias), atol=2e-6
    )
    tables = table.reshape(3, 2, S)
    each = jax.vmap(lambda q, k, v, table: mqa_jax.dot_product_attention(q, k, v, score_fn=(of_row, table)))
    bias = tables[:, :, None, None]
    np.testing.assert_allclose(each(query, key, value, tables), jax.vmap(attend)(query, key, value, bias), atol=2e-6)


# -- transformations --------------------------------------------------------------------------------------------------


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

        gradient = jax.make_jaxpr(jax.grad(loss))({name: of.arrays[name] for name in names})
        return str(gradient).count("while") + str(gradient).count("scan")

    asked, unasked = program("query", "score_fn[1]"), program("query")
    assert (asked > unasked) == (implementation == "kernels"), f"{asked=}, {unasked=}"


# -- caches -----------------------------------------------------------------------------------------------------------


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


# -- which tiles are computed -----------------------------------------------------------------------------------------


def visits(of: oracle.Problem, backward: bool) -> int:
    """How many tiles of 8 x 16 plain XLA computes, counted when the program runs."""
    counted = []

    def counting(score, batch, head, query, key):
        jax.debug.callback(lambda: counted.append(1))
        return score

    with ways.small_tiles((8, 16, 2, True)) as implementation:
        options = of.options | {"score_fn": counting}
        run = oracle.results if backward else oracle.outputs
        jax.block_until_ready(run(replace(of, options=options), implementation))
    jax.effects_barrier()
    return len(counted)


@pytest.mark.parametrize("name", ["prefix", "documents", "sink and window", "dilated"])
def test_plain_xla_computes_the_tiles_in_which_something_is_seen(name):
    of = problem(READY[name], rows=64)
    seen = tiles_seen(of, 8, 16)
    assert visits(of, backward=False) == seen.any((3, 5)).any(1).sum() < B * 8 * 6 or name == "dilated"
    assert visits(of, backward=True) == 3 * seen.any((3, 5)).any(1).sum()


def tiles_seen(of: oracle.Problem, rows: int, columns: int) -> Any:
    """`[B, N, row tiles, rows, column tiles, columns]`, by the whole array."""
    inputs = inputs_of(**oracle.arguments(of.arrays, of.options))
    size = inputs.sizes
    found: Any = masks.visible(inputs.mask, *map(jnp.arange, (size.T, size.S, size.N)))
    visible = np.broadcast_to(found, (size.B, size.N, size.T, size.S))
    padded = np.pad(visible, [(0, 0), (0, 0), (0, -size.T % rows), (0, -size.S % columns)])
    return padded.reshape(size.B, size.N, padded.shape[2] // rows, rows, -1, columns)


def heads_differ(batch, head, query, key, lengths):
    return key < lengths[batch] + 16 * head


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("name", ["prefix", "documents", "sink and window", "tree", "heads"])
def test_bounds_of_a_function_are_the_hull_of_what_is_seen(name, group):
    heads = {"mask_fn": heads_differ, "mask_fn[1]": jnp.asarray([21, 0])}
    of = problem(READY.get(name, heads))
    rows, columns = 16, 8
    inputs = inputs_of(**oracle.arguments(of.arrays, of.options))
    seen = tiles_seen(of, rows // group, columns)
    some = seen.any((3, 5)).any(1)  # of any head
    of_batch = lambda bounds: np.broadcast_to(bounds, (B, *bounds.shape[1:]))
    bounds = of_batch(tile_bounds.key_tiles(inputs.mask, inputs.sizes, rows, columns, group))
    assert (bounds[..., 1] < bounds[..., 2]).any() == (name != "sink and window")
    for batch in range(B):
        assert [tuple(x) for x in bounds[batch, :, [0, 3]].T] == hull_of_tiles(some[batch])
        for row_tile, (_, start, stop, _) in enumerate(bounds[batch]):
            assert seen[batch, :, row_tile, : len_of(row_tile, rows // group, T), start:stop].all()
    if group == 1:
        bounds = of_batch(tile_bounds.row_tiles(inputs.mask, inputs.sizes, rows, columns))
        for batch in range(B):
            assert [tuple(x) for x in bounds[batch, :, [0, 3]].T] == hull_of_tiles(some[batch].T)


def len_of(tile: int, size: int, length: int) -> int:
    return min(size, length - tile * size)


def hull_of_tiles(some: np.ndarray) -> list[tuple[int, int]]:
    found = [np.flatnonzero(line) for line in some]
    return [(int(x[0]), int(x[-1]) + 1) if x.size else (0, 0) for x in found]
