"""`jax.vmap` over batch rows, one argument, traced options."""

import jax
import jax.numpy as jnp
import jax.test_util
from causal_problem import ARRAYS, attend, close, gradient


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
