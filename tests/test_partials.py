"""Results over parts of the keys, put together, are the results over all of them."""

import jax
import jax.numpy as jnp
import numpy as np

import mqa_jax

KEYS = jax.random.split(jax.random.key(0), 3)
QUERY = jax.random.normal(KEYS[0], (2, 3, 4, 8))
KEY, VALUE = (jax.random.normal(key, (2, 12, 2, 8)) for key in KEYS[1:])


def parts(lengths):
    """Three parts of four keys each, of which each batch row has so many."""
    results = [
        mqa_jax.dot_product_attention(
            QUERY, KEY[:, i : i + 4], VALUE[:, i : i + 4], key_value_seq_lengths=lengths[i // 4], return_residual=True
        )
        for i in (0, 4, 8)
    ]
    return tuple(jnp.stack(x) for x in zip(*results))


def test_parts_are_the_whole():
    whole = mqa_jax.dot_product_attention(QUERY, KEY, VALUE, return_residual=True)
    with jax.numpy_rank_promotion("raise"):
        merged = mqa_jax.merge_partials(*parts(jnp.full((3, 2), 4)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, whole)


def test_empty_parts_change_no_bit_and_nothing_is_nothing():
    outs, log_sum_exps = parts(jnp.array([[4, 0], [0, 0], [0, 0]]))
    out, log_sum_exp = mqa_jax.merge_partials(outs, log_sum_exps)
    np.testing.assert_array_equal(out[0], outs[0, 0])
    np.testing.assert_array_equal(log_sum_exp[0], log_sum_exps[0, 0])
    assert not out[1].any()
    assert np.isneginf(log_sum_exp[1]).all()


def test_it_keeps_the_dtype_and_has_gradients():
    outs, log_sum_exps = parts(jnp.array([[4, 0], [4, 0], [4, 0]]))
    assert mqa_jax.merge_partials(outs.astype(jnp.bfloat16), log_sum_exps)[0].dtype == jnp.bfloat16
    loss = lambda outs, log_sum_exps: mqa_jax.merge_partials(outs, log_sum_exps)[0].sum()
    gradients = jax.grad(loss, argnums=(0, 1))(outs, log_sum_exps)
    assert all(np.isfinite(x).all() for x in gradients)
    np.testing.assert_allclose(gradients[0].sum(0)[0], 1.0, atol=1e-6)  # the weights of the parts
