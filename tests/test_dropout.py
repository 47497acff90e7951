"""The keep-mask: its rate, its independence of everything but (key, batch row, head, row, column), its generator."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import mqa_jax
from mqa_jax.dropout import Dropout, keep

SIZES = 3, 4, 64, 130  # batch, heads, rows, columns


def _keep(rate: float, seed: int = 0, sizes=SIZES) -> np.ndarray:
    dropout = Dropout.make(jax.random.key(seed), rate, jnp.arange(sizes[0]))
    indices: Any = np.ogrid[tuple(slice(n) for n in sizes)]
    return np.asarray(keep(dropout, *indices))


@pytest.mark.parametrize("rate", [0.0001, 0.1, 0.5, 0.9])
def test_rate(rate):
    kept = _keep(rate)
    deviation = np.sqrt(rate * (1 - rate) / kept.size)
    assert abs(1 - kept.mean() - rate) < 5 * deviation + 2**-16
    for axis in range(4):  # along each axis too: no row, column, head or batch row is special
        means = 1 - kept.mean(axis=tuple(i for i in range(4) if i != axis))
        count = kept.size / kept.shape[axis]
        assert np.abs(means - rate).max() < 6 * np.sqrt(rate * (1 - rate) / count) + 2**-16


def test_extremes():
    assert _keep(0.0).all()
    assert not _keep(1.0).any()


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("shift", [1, 2])
def test_neighbours_are_independent(axis, shift):
    kept = _keep(0.5).astype(float) - 0.5
    rolled = np.roll(kept, shift, axis)
    assert abs((kept * rolled).mean() * 4) < 5 / np.sqrt(kept.size)


def test_another_key_is_another_mask():
    agreement = (_keep(0.5, seed=0) == _keep(0.5, seed=1)).mean()
    assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(np.prod(SIZES))


def test_entries_do_not_depend_on_the_size_of_the_array():
    np.testing.assert_array_equal(_keep(0.3)[:2, :3, :7, :11], _keep(0.3, sizes=(2, 3, 7, 11)))


def test_numpy_computes_the_same():
    """Written out with Python integers, as a kernel author would check a port of it."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    golden, seed = 0x9E3779B9, [int(n) for n in jax.random.bits(jax.random.key(5), (2,), jnp.uint32)]
    kept = _keep(0.25, seed=5)
    for b, n, t, s in np.random.default_rng(0).integers(0, SIZES, (200, 4)):
        stream = mix(seed[0] ^ mix((seed[1] + int(b)) & 0xFFFFFFFF))
        stream = mix(mix((stream + int(n) * golden) & 0xFFFFFFFF) ^ int(t))
        word = mix((stream + (int(s) >> 1) * golden) & 0xFFFFFFFF)
        assert kept[b, n, t, s] == (((word >> ((int(s) & 1) * 16)) & 0xFFFF) >= 0.25 * 65536)


def test_the_mean_of_the_output_stays():
    """Over many keys, the average of dropped outputs is the output without dropout."""
    problem = oracle.random_problem(
        np.random.default_rng(0), batch=(), rows=5, columns=40, heads=2, kv_heads=1, features=8
    )
    attend = lambda rng: mqa_jax.dot_product_attention(**problem.arrays, dropout_rate=0.3, dropout_rng=rng)
    outputs = jax.lax.map(attend, jax.random.split(jax.random.key(0), 1000))
    error = outputs.mean(0) - mqa_jax.dot_product_attention(**problem.arrays)
    assert np.abs(error / (outputs.std(0) / np.sqrt(1000))).max() < 5


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_of_a_batch_drop_the_same_alone_or_in_more_axes(implementation):
    rng = np.random.default_rng(0)
    problem = oracle.random_problem(rng, batch=(2, 3), rows=5, columns=7, heads=2, kv_heads=1, features=4)
    attend = lambda arrays: mqa_jax.dot_product_attention(
        **arrays, dropout_rate=0.5, dropout_rng=jax.random.key(0), implementation=implementation
    )
    flat = {name: x.reshape(6, *x.shape[2:]) for name, x in problem.arrays.items()}
    np.testing.assert_array_equal(attend(problem.arrays).reshape(6, 5, 2, 4), attend(flat))
    first = {name: x[:1] for name, x in flat.items()}
    # Summed in another order: the number of rows decides by which program. A weight dropped or not makes 0.1.
    np.testing.assert_allclose(attend(flat)[:1], attend(first), atol=1e-6)


def test_every_weight_dropped_gives_zero():
    problem = oracle.random_problem(
        np.random.default_rng(0),
        rows=5,
        columns=7,
        heads=2,
        kv_heads=1,
        features=4,
        dropout_rate=1.0,
        dropout_rng=jax.random.key(0),
    )
    for implementation in ("xla", "reference"):
        assert not oracle.results(problem, implementation)["out"].any()
