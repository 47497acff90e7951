"""Arguments as `jax.nn.dot_product_attention` takes them."""

from typing import Any

import jax
import jax.test_util
import numpy as np
import pytest
from causal_problem import ARRAYS, attend, close

import mqa_jax


def test_lists_and_numpy_arrays():
    lists = [np.asarray(x).tolist() for x in ARRAYS]
    close(attend(*lists), attend(*ARRAYS))


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
