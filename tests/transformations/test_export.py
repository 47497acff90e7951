"""`jax.export`: for several platforms, with symbols for batch and lengths."""

import functools
import warnings

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import oracle
import pytest
from causal_problem import ARRAYS, attend, close
from jax import export

import mqa_jax


@pytest.mark.parametrize(("implementation", "platforms"), [(None, ["cpu"]), ("xla", ["cpu", "cuda"])])
def test_export_and_back(implementation, platforms):
    """For several platforms at once only without Pallas, of which JAX lowers all for all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        function = jax.jit(functools.partial(attend, implementation=implementation))
        exported = export.export(function, platforms=platforms)(*ARRAYS)
        again = export.deserialize(exported.serialize())
    close(again.call(*ARRAYS), attend(*ARRAYS))


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
