"""JAX's transformations of the function: what works, and that it computes the same."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export

import mqa_jax

PROBLEM = oracle.random_problem(
    np.random.default_rng(0), batch=(2,), rows=13, columns=17, heads=4, kv_heads=2, features=8, value_features=4
)
ARRAYS = tuple(PROBLEM.arrays.values())
attend = functools.partial(mqa_jax.dot_product_attention, is_causal=True, query_offset=3)
gradient = jax.grad(lambda *arrays: jnp.sum(attend(*arrays) ** 2), argnums=(0, 1, 2))
close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, atol=1e-5))


def test_jit():
    close(jax.jit(gradient)(*ARRAYS), gradient(*ARRAYS))


def test_vmap_over_a_batch_axis():
    close(jax.vmap(attend)(*ARRAYS), attend(*ARRAYS))
    alone = lambda *row: gradient(*row)
    close(jax.vmap(alone)(*ARRAYS), gradient(*ARRAYS))


def test_vmap_over_one_argument():
    """Many queries on the same keys."""
    query, key, value = ARRAYS
    close(jax.vmap(attend, in_axes=(0, None, None))(query, key[0], value[0])[1], attend(query[1], key[0], value[0]))


def test_vmap_over_options():
    """Traced options may be mapped: offsets, lengths, dropout keys."""
    query, key, value = (x[0] for x in ARRAYS)
    mapped = jax.vmap(lambda n: attend(query, key, value, query_offset=n, key_value_seq_lengths=n + 5))(jnp.arange(3))
    for n in range(3):
        close(mapped[n], attend(query, key, value, query_offset=n, key_value_seq_lengths=jnp.int32(n + 5)))
    keys = jax.random.split(jax.random.key(0), 3)
    dropped = jax.vmap(lambda rng: attend(query, key, value, dropout_rate=0.5, dropout_rng=rng))(keys)
    close(dropped[2], attend(query, key, value, dropout_rate=0.5, dropout_rng=keys[2]))


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable])
def test_remat(policy):
    remat = jax.checkpoint(attend, policy=policy)
    close(jax.grad(lambda *arrays: jnp.sum(remat(*arrays) ** 2), argnums=(0, 1, 2))(*ARRAYS), gradient(*ARRAYS))


def test_scan():
    def layer(query, _):
        return attend(query, *ARRAYS[1:])[..., :1] + query, None

    def unrolled(query):
        for _ in range(3):
            query, _ = layer(query, None)
        return query

    scanned = lambda query: jax.lax.scan(layer, query, None, length=3)[0]
    close(scanned(ARRAYS[0]), unrolled(ARRAYS[0]))
    close(*(jax.grad(lambda q, f=f: f(q).sum())(ARRAYS[0]) for f in (scanned, unrolled)))


def test_one_trace_for_all_values_of_traced_options():
    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(offset, lengths, rng):
        return mqa_jax.dot_product_attention(
            *ARRAYS, query_offset=offset, key_value_seq_lengths=lengths, dropout_rate=0.1, dropout_rng=rng
        )

    for i in range(3):
        step(jnp.array([i, 2]), jnp.array([7, i]), jax.random.key(i))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowering_for_a_platform_that_is_not_here(platform):
    """What runs is settled when it is lowered; the default device of this process has no say."""
    loss = lambda *arrays: jnp.sum(attend(*arrays, implementation="xla") ** 2)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*ARRAYS)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text
    others = [traced.lower(lowering_platforms=(other,)).as_text() for other in ("cpu", "cuda")]
    assert others[0] != others[1]  # other tiles
    assert text == others[platform != "cpu"]


@pytest.mark.parametrize(("implementation", "platforms"), [(None, ["cpu"]), ("xla", ["cpu", "cuda"])])
def test_export_and_back(implementation, platforms):
    """For several platforms at once only without Pallas, of which JAX lowers all for all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        function = jax.jit(functools.partial(attend, implementation=implementation))
        exported = export.export(function, platforms=platforms)(*ARRAYS)
        again = export.deserialize(exported.serialize())
    close(again.call(*ARRAYS), attend(*ARRAYS))


def test_donation():
    query = ARRAYS[0][..., :4] + 0  # as large as the output
    step = jax.jit(lambda q: attend(q, ARRAYS[1][..., :4], ARRAYS[2]), donate_argnums=0)
    expected = attend(query, ARRAYS[1][..., :4], ARRAYS[2])
    close(step(query), expected)
    assert query.is_deleted()


def test_float0_and_symbolic_zeros():
    """Only some arguments are differentiated, only one result is used."""
    query, key, value = ARRAYS
    loss = lambda key: jnp.sum(attend(query, key, value, return_residual=True)[1])
    close(jax.grad(loss)(key), jax.grad(lambda k: jnp.sum(attend(query, k, value, return_residual=True)[1]))(key))
    whole = jax.grad(lambda *a: jnp.sum(attend(*a, return_residual=True)[1]), argnums=(0, 1, 2))(*ARRAYS)
    close(jax.grad(loss)(key), whole[1])
    assert not whole[2].any()


def test_lists_and_numpy_arrays():
    lists = [np.asarray(x).tolist() for x in ARRAYS]
    close(attend(*lists), attend(*ARRAYS))


@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_jax_enable_x64_changes_nothing(implementation, rows):
    """Python numbers are then 64 bits wide, and 64-bit lengths stay so."""
    rng = np.random.default_rng(0)
    problem = oracle.random_problem(
        rng,
        batch=(16,),
        rows=rows,
        columns=17,
        heads=4,
        kv_heads=2,
        features=8,
        bias=jnp.asarray(rng.standard_normal((4, 1, 17)), jnp.float32),
        sinks=jnp.ones(4),
        alibi_slopes=mqa_jax.alibi_slopes(4),
        is_causal=True,
        query_offset=3,
        key_value_seq_lengths=np.arange(16),
        query_segment_ids=np.zeros((16, rows), np.int64),
        key_value_segment_ids=np.zeros((16, 17), np.int64),
        local_window_size=5,
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )
    expected = oracle.results(problem, "reference")
    with jax.enable_x64(True):
        actual = oracle.results(problem, implementation)
    oracle.judge_float32(actual, expected)


@pytest.mark.parametrize("precision", ["highest", "default", jax.lax.Precision.HIGH])
def test_precision_is_passed_on(precision):
    text = jax.jit(functools.partial(attend, precision=precision)).lower(*ARRAYS).as_text()
    name = jax.lax.Precision(precision).name if not isinstance(precision, str) else precision.upper()
    assert f"precision = [{name}, {name}]" in text
