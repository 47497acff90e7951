"""What the tiled XLA kernels do not do: memory that grows with the square of a length, tiles in vain."""

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import mqa_jax
from mqa_jax.inputs import Inputs, Operands, Sizes
from mqa_jax.kernels.xla import forward
from mqa_jax.kernels.xla import implementation as xla
from mqa_jax.kernels.xla.forward import forward_in_tiles
from mqa_jax.kernels.xla.tile import TileShape
from mqa_jax.masks import Mask


def _compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()


def _gradient_of_causal(query, key, value):
    attend = functools.partial(mqa_jax.dot_product_attention, is_causal=True)
    return jax.grad(lambda *arrays: attend(*arrays).sum(), argnums=(0, 1, 2))(query, key, value)


def test_memory_is_linear_in_length():
    """Forward and backward at T = 16384 with 8 heads on 1 stay under 1 GiB; scores alone would be 8 GiB."""
    temporaries = [
        _compiled(_gradient_of_causal, (1, length, 8, 64), (1, length, 1, 64), (1, length, 1, 64))
        .memory_analysis()
        .temp_size_in_bytes
        for length in (8192, 16384)
    ]
    assert temporaries[1] < 2**30
    assert temporaries[1] < 2.2 * temporaries[0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8], ids=["bfloat16", "int8"])
def test_tiles_of_a_narrow_cache_are_converted_one_by_one(dtype):
    """Not all of it before the loop, as XLA would like to."""
    cache, scale = jax.ShapeDtypeStruct((1, 2**16, 1, 64), dtype), jax.ShapeDtypeStruct((1, 2**16, 1), jnp.float32)
    scales = dict(key_scale=scale, value_scale=scale) if dtype == jnp.int8 else {}
    query = jax.ShapeDtypeStruct((1, 1, 32, 64), jnp.bfloat16)
    compiled = jax.jit(mqa_jax.dot_product_attention).lower(query, cache, cache, **scales).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2**20


def test_no_array_of_all_scores_and_no_repeated_keys():
    """In the optimised program: nothing with T x S elements, and nothing of key size with query heads."""
    rows, columns, heads, kv_heads, features = 1031, 4099, 12, 3, 64
    text = _compiled(
        _gradient_of_causal,
        (1, rows, heads, features),
        (1, columns, kv_heads, features),
        (1, columns, kv_heads, features),
    ).as_text()
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"f32\[([\d,]+)\]", text)}
    assert (1, columns, kv_heads, features) in shapes
    assert not [shape for shape in shapes if rows in shape and columns in shape]
    assert max(np.prod(shape) for shape in shapes) < columns * heads * features


def test_tiles_that_the_mask_empties_are_not_computed():
    """A window of 64 over 4096 keys visits no more tiles than it touches; counted as the loops run."""
    visits = []
    shape = TileShape(rows=128, columns=128, heads=1, upcast=True)
    arrays = oracle.random_problem(
        np.random.default_rng(0), batch=(1,), rows=4096, columns=4096, heads=1, kv_heads=1, features=8
    ).arrays
    inputs = Inputs(Operands(**arrays), Mask(is_causal=True, window=(64, 0)), scale=1.0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        attend = forward.attend

        def counted(*arguments):
            jax.debug.callback(lambda: visits.append(1))
            return attend(*arguments)

        monkeypatch.setattr(forward, "attend", counted)
        out, _ = jax.jit(functools.partial(forward_in_tiles, shape=shape))(inputs)
        jax.block_until_ready(out)
        jax.effects_barrier()
    assert len(visits) == 32 + 31  # the diagonal tile, and the one before it for all but the first


def test_tile_shapes_are_legal_for_any_sizes():
    for size in itertools.product([1, 64], [1, 2, 50, 5000], [1, 3, 5000], [(1, 1), (9, 3), (71, 1), (32, 32)]):
        batch, rows, columns, (heads, kv_heads) = size
        sizes = Sizes(batch, rows, columns, heads, kv_heads, heads // kv_heads, 64, 64)
        for shape in (xla.tiles_for_cpu(sizes), xla.tiles_for_accelerator(sizes)):
            assert 1 <= shape.rows <= rows
            assert 1 <= shape.columns <= columns
            assert kv_heads % shape.heads == 0
        assert 1 <= xla.steps_for_cpu(sizes).columns <= columns
