"""Which number of `batch` a function is given, with several leading axes and under `jax.vmap`."""

import functools

import jax
import numpy as np
import pytest
from ready_made import S, T, normal, problem

import mqa_jax


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
