"""What JAX has for debugging: `jax_debug_nans`, `jax_debug_infs`, `jax.disable_jit`, checkify."""

import functools

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from causal_problem import ARRAYS
from jax.experimental import checkify
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mqa_jax
from mqa_jax.cache import append


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


def _checkified(function, *arguments):
    error, results = checkify.checkify(jax.jit(function), errors=checkify.all_checks)(*arguments)
    assert error.get() is None
    return results


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
    write = lambda old, new, start: append.write(old, new, start, jnp.ones(2, bool))
    written = jax.vmap(write)(old, new, start)
    for row, (old_row, new_row, at) in enumerate(zip(old, new, start)):
        np.testing.assert_array_equal(written[row], write(old_row, new_row, at))
    gradient = jax.grad(lambda new: jnp.sum(write(old[0], new, start[0]) ** 2))(new[0])
    np.testing.assert_allclose(gradient, 2 * new[0])
    jax.test_util.check_grads(lambda new: write(old[0], new, start[0]), (new[0],), order=2)


def test_a_written_cache_has_the_type_of_the_cache():
    """On Explicit mesh axes how it is cut; inside of `jax.shard_map` over which axes it varies."""
    arrays = jnp.zeros((4, 6, 1, 2)), jnp.zeros((4, 1, 1, 2)), jnp.zeros(4, int), jnp.ones(4, bool)
    mesh = AbstractMesh((2,), ("b",), axis_types=(AxisType.Explicit,))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("b"))) for x in arrays]
    found = []

    def write(*arrays):
        written = append.write(*arrays)
        found.append(jax.typeof(written) == jax.typeof(arrays[0]))
        return written

    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(write, *shapes)
        jax.eval_shape(jax.shard_map(write, in_specs=P("b"), out_specs=P("b")), *shapes)
    assert found == [True, True]
