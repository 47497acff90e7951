"""JAX's transformations of the function: what works, and that it computes the same."""

import functools
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from jax import export
from jax.experimental import checkify

import mqa_jax
from mqa_jax.cache import append

PROBLEM = oracle.random_problem(
    np.random.default_rng(0), batch=(2,), rows=13, columns=17, heads=4, kv_heads=2, features=8, value_features=4
)
ARRAYS = tuple(PROBLEM.arrays.values())
attend = functools.partial(mqa_jax.dot_product_attention, is_causal=True, query_offset=3)
gradient = jax.grad(lambda *arrays: jnp.sum(attend(*arrays) ** 2), argnums=(0, 1, 2))


def close(actual, expected, **tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **{"atol": 1e-5, **tolerance}), actual, expected)


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


@pytest.mark.parametrize("way", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_no_gradient_that_is_asked_for_is_left_out(way):
    """JAX keeps what it traced for some operands and uses it for others: one function, differentiated both ways."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    operands = *ARRAYS, normal(1, 4, 13, 17), normal(4), normal(4)

    def loss(implementation):
        def function(query, key, value, bias, slopes, sinks):
            options = dict(alibi_slopes=slopes, sinks=sinks, implementation=implementation)
            return jnp.sum(attend(query, key, value, bias, **options) ** 2)

        return function

    expected = jax.grad(loss("reference"), argnums=range(6))(*operands)
    function = way(loss("xla"))
    for wanted in [(0, 1, 2), (0, 3, 4, 5), (3,), (4,), (0,)]:
        actual = jax.jit(jax.grad(function, argnums=wanted))(*operands)
        close(actual, tuple(expected[number] for number in wanted), atol=1e-4)


def _layers(function):
    """Three of them, scanned and rematerialised."""

    def scanned(query, *others):
        layer = jax.checkpoint(lambda x, _: (function(x, *others), None))
        return jax.lax.scan(layer, query, None, length=3)[0]

    return scanned


@pytest.mark.parametrize("wrapper", [lambda f: f, jax.checkpoint, _layers], ids=["plain", "checkpoint", "scan"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_bias_that_nobody_differentiates_costs_no_gradient(wrapper, stopped):
    """Neither the array of its size nor the work; with `stop_gradient` as well."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    operands = *[array(1, 1024, 4, 16)] * 3, array(1, 4, 1024, 1024)

    def function(query, key, value, bias):
        bias = jax.lax.stop_gradient(bias) if stopped else bias
        return mqa_jax.dot_product_attention(query, key, value, bias, implementation="xla")

    gradient = jax.grad(lambda *arrays: jnp.sum(wrapper(function)(*arrays)), argnums=(0, 1, 2))
    memory: Any = jax.jit(gradient).lower(*operands).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 1024 * 1024 * 4


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_rows_that_see_nothing_pass_jax_debug_infs(wrapper, implementation):
    options = dict(key_value_seq_lengths=jnp.array([0, 5]), implementation=implementation)
    function = lambda *arrays: mqa_jax.dot_product_attention(*arrays, **options)
    with jax.debug_infs(True), jax.debug_nans(True):
        wrapper(function)(*ARRAYS)
        wrapper(jax.grad(lambda *arrays: jnp.sum(function(*arrays)), argnums=(0, 1, 2)))(*ARRAYS)
        with pytest.raises(FloatingPointError):
            mqa_jax.dot_product_attention(*ARRAYS, **options, return_residual=True)


@pytest.mark.parametrize("rows", [1, 13])
def test_without_jit(rows):
    """Each primitive runs by itself: attention, its tangents, its gradients."""
    query, *others = ARRAYS
    function = lambda *arrays: mqa_jax.dot_product_attention(*arrays, implementation="xla")
    square = lambda *arrays: jnp.sum(function(*arrays) ** 2)
    for transformed in (
        function,
        jax.vmap(function),
        jax.grad(square, argnums=(0, 1, 2)),
        lambda *arrays: jax.jvp(square, arrays, arrays),
    ):
        arrays = query[:, :rows], *others
        expected = transformed(*arrays)
        with jax.disable_jit():
            found = transformed(*arrays)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("rows", [1, 13])
def test_precision_is_passed_on_by_every_path(rows, platform):
    """But by the sums that XLA on CPUs takes instead of products: they are exact."""
    query = jax.ShapeDtypeStruct((8, rows, 4, 8), jnp.float32)
    key = jax.ShapeDtypeStruct((8, 17, 2, 8), jnp.float32)
    function = functools.partial(mqa_jax.dot_product_attention, precision="highest", implementation="xla")
    text = jax.jit(function).trace(query, key, key).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert products or (platform, rows) == ("cpu", 1)


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_export_with_symbols_for_batch_and_lengths(implementation):
    batch, rows, columns = export.symbolic_shape("b, t, s")
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = array(batch, rows, 4, 8), array(batch, columns, 2, 8), array(batch, columns, 2, 8)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def function(query, key, value, lengths, offset):
        options = dict(key_value_seq_lengths=lengths, query_offset=offset, is_causal=True, local_window_size=(200, 0))
        attend = functools.partial(mqa_jax.dot_product_attention, **options, implementation=implementation)
        return jax.value_and_grad(lambda *a: jnp.sum(attend(*a) ** 2), argnums=(0, 1, 2))(query, key, value)

    exported = export.export(jax.jit(function))(*shapes, row, row)
    for size in [(1, 1, 1), (2, 13, 17), (3, 300, 5)]:
        problem = oracle.random_problem(
            np.random.default_rng(0), batch=size[:1], rows=size[1], columns=size[2], heads=4, kv_heads=2, features=8
        )
        lengths = jnp.arange(size[0], dtype=jnp.int32) * 2 + 1
        arrays = *problem.arrays.values(), lengths, lengths - 1
        close(exported.call(*arrays), jax.jit(function)(*arrays), rtol=1e-5)


JAX_NN: dict[str, dict[str, Any]] = {
    "lengths": dict(query_seq_lengths=np.array([4], np.int32), key_value_seq_lengths=np.array([3], np.int32)),
    "bias [1, N, T, S]": dict(bias=np.random.default_rng(1).standard_normal((1, 4, 5, 7)).astype(np.float32)),
    "bias [N, T, S]": dict(bias=np.random.default_rng(1).standard_normal((4, 5, 7)).astype(np.float32)),
    "mask [1, N, T, S]": dict(mask=np.arange(140).reshape(1, 4, 5, 7) % 3 > 0),
    "mask [1, 1, 1, S]": dict(mask=np.arange(7).reshape(1, 1, 1, 7) % 3 > 0),
    "mask [T, S]": dict(mask=np.arange(35).reshape(5, 7) % 3 > 0),
    "causal": dict(is_causal=True, scale=0.3),
    "window": dict(local_window_size=(2, 3)),
}


@pytest.mark.parametrize("name", JAX_NN)
@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 1)], ids=["TNH SKH", "TNH 1SKH", "1TNH 1SKH"])
def test_a_batch_of_one_as_in_jax_nn(name, axes):
    rng = np.random.default_rng(0)
    shapes = (*[1] * axes[0], 5, 4, 8), (*[1] * axes[1], 7, 2, 8), (*[1] * axes[1], 7, 2, 8)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    with jax.numpy_rank_promotion("allow"):
        expected = jax.nn.dot_product_attention(*arrays, **JAX_NN[name])
    close(mqa_jax.dot_product_attention(*arrays, **JAX_NN[name]), expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rows", [1, 13])
@pytest.mark.parametrize("implementation", [None, "xla", "reference"])
def test_float64_is_computed_in_float64(implementation, rows):
    """Output, log-sum-exp and gradients, with every option, against sums in numpy and each other."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
        arrays: dict[str, Any] = dict(query=normal(8, rows, 4, 8), key=normal(8, 17, 2, 8), value=normal(8, 17, 2, 8))
        arrays |= dict(bias=normal(4, rows, 17), alibi_slopes=normal(4) / 8, sinks=normal(4))
        options: dict[str, Any] = dict(
            key_value_seq_lengths=np.arange(8) + 2, logits_soft_cap=2.0, return_residual=True
        )

        def textbook(query, key, value, bias, alibi_slopes, sinks):
            score = np.einsum("btnh,bsnh->bnts", query, key.repeat(2, axis=2)) / 8**0.5
            distance = np.abs(np.arange(17) - np.arange(rows)[:, None])
            score = 2 * np.tanh(score / 2) + bias - alibi_slopes[:, None, None] * distance
            seen = np.arange(17) < options["key_value_seq_lengths"][:, None, None, None]
            weight = np.where(seen, np.exp(score), 0)
            total = weight.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
            out = np.einsum("bnts,bsnv->btnv", weight / total, value.repeat(2, axis=2))
            return out, np.log(total)[..., 0].swapaxes(1, 2)

        attend = functools.partial(mqa_jax.dot_product_attention, **options, implementation=implementation)
        out, log_sum_exp = attend(**arrays)
        assert out.dtype == log_sum_exp.dtype == jnp.float64
        expected = textbook(**{name: np.asarray(x) for name, x in arrays.items()})
        np.testing.assert_allclose(out, expected[0], atol=1e-13)
        np.testing.assert_allclose(log_sum_exp, expected[1], atol=1e-13)
        loss = lambda arrays, name: sum(
            jnp.sum(x**2) for x in mqa_jax.dot_product_attention(**arrays, **options, implementation=name)
        )
        gradients, wanted = (
            jax.jit(jax.grad(loss), static_argnums=1)(arrays, name) for name in (implementation, "reference")
        )
        for name, gradient in gradients.items():
            assert gradient.dtype == jnp.float64
            np.testing.assert_allclose(gradient, wanted[name], atol=1e-12, err_msg=name)
        for name in ("triton", "cudnn"):
            with pytest.raises(NotImplementedError, match="float64"):
                attend(**arrays, implementation=name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("rows", [1, 13])
def test_rank_promotion_may_raise(rows, implementation):
    """jax_numpy_rank_promotion="raise": every option, forward and backward."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    problem = oracle.random_problem(
        rng,
        batch=(8,),
        rows=rows,
        columns=37,
        heads=4,
        kv_heads=2,
        features=8,
        bias=normal(4, 1, 37),
        alibi_slopes=normal(4),
        sinks=normal(4),
        mask=normal(37) > -1,
        is_causal=True,
        local_window_size=9,
        query_offset=jnp.arange(8),
        query_seq_lengths=jnp.full(8, rows),
        key_value_seq_lengths=jnp.arange(8) + 5,
        query_segment_ids=jnp.zeros((8, rows), jnp.int32),
        key_value_segment_ids=jnp.zeros((8, 37), jnp.int32),
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )
    with jax.numpy_rank_promotion("raise"):
        actual = oracle.results(problem, implementation)
    oracle.judge_float32(actual, oracle.results(problem, "reference"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("tokens", [1, 5, 29])
def test_rank_promotion_may_raise_in_modules_with_a_cache(layout, tokens):
    module = mqa_jax.GroupedQueryAttention(
        32, 4, kv_heads=2, rope=mqa_jax.Rope(), local_window_size=(7, 0), cache_layout=layout, qk_ln=True, alibi=True
    )
    x = jnp.ones((2, tokens, 32))
    with jax.numpy_rank_promotion("raise"):
        params = module.init(jax.random.key(0), x)
        cache = module.init_cache(2, 40)
        step = jax.jit(lambda cache: module.apply({**params, "cache": cache}, x, mutable=["cache"]))
        (out, *_), variables = step(cache)
        step(variables["cache"])
    assert jnp.isfinite(out).all()


def _checkified(function, *arguments):
    error, results = checkify.checkify(jax.jit(function), errors=checkify.all_checks)(*arguments)
    assert error.get() is None
    return results


@pytest.mark.sampled(4)
@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("rows", [1, 40])
def test_all_checks_of_checkify_find_nothing_where_nothing_is_wrong(implementation, rows):
    """Rows that see nothing, lengths of 0 and dropped weights included; forward and backward."""
    problem = oracle.random_problem(
        np.random.default_rng(0),
        rows=rows,
        columns=50,
        heads=4,
        kv_heads=2,
        features=8,
        is_causal=True,
        query_offset=-3,
        local_window_size=(9, 0),
        key_value_seq_lengths=jnp.array([0, 17]),
        sinks=jnp.asarray([0.0, -jnp.inf, 1.0, 2.0]),
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )
    attend = functools.partial(mqa_jax.dot_product_attention, implementation=implementation, **problem.options)
    gradients = _checkified(jax.grad(lambda arrays: attend(**arrays).sum()), problem.arrays)
    chex.assert_trees_all_close(gradients, jax.grad(lambda arrays: attend(**arrays).sum())(problem.arrays), atol=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "settings",
    [{}, dict(cache_layout="ring", local_window_size=(3, 0)), dict(cache_dtype="int8"), dict(rope=mqa_jax.Rope())],
    ids=["static", "ring", "int8", "rope"],
)
def test_all_checks_of_checkify_find_nothing_in_cached_steps(settings):
    """Chunks, padding and single tokens, into rows at different positions; longer than a ring, too."""
    layer = mqa_jax.GroupedQueryAttention(32, 4, kv_heads=2, **settings)
    x = jax.random.normal(jax.random.key(1), (2, 30, 32))
    params = layer.init(jax.random.key(0), x)["params"]
    step = lambda cache, x, lengths: layer.apply(
        {"params": params, "cache": cache}, x, seq_lengths=lengths, mutable=["cache"]
    )
    cache = layer.init_cache(2, 40)
    for tokens, lengths in ((3, (3, 1)), (1, (1, 1)), (30, (30, 20)), (2, (0, 2))):
        arguments = cache, x[:, :tokens], jnp.array(lengths)
        (out, _, _), state = _checkified(step, *arguments)
        (expected, _, _), _ = step(*arguments)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        cache = state["cache"]


def test_what_checkify_does_not_look_into_can_be_mapped_and_differentiated():
    """Writing into a static cache is a primitive of ours, with the rules that JAX asks of one."""
    old, new = jnp.zeros((3, 2, 7, 1, 4)), jax.random.normal(jax.random.key(0), (3, 2, 2, 1, 4))
    start = jnp.array([[0, 5], [2, 3], [1, 1]])
    write = lambda old, new, start: append._write(old, new, start, jnp.ones(2, bool))
    written = jax.vmap(write)(old, new, start)
    for row, (old_row, new_row, at) in enumerate(zip(old, new, start)):
        np.testing.assert_array_equal(written[row], write(old_row, new_row, at))
    gradient = jax.grad(lambda new: jnp.sum(write(old[0], new, start[0]) ** 2))(new[0])
    np.testing.assert_allclose(gradient, 2 * new[0])
    jax.test_util.check_grads(lambda new: write(old[0], new, start[0]), (new[0],), order=2)
