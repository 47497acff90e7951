"""The table of tiles: complete, legal, with a reason for each entry, and found for the GPU at hand."""

import itertools
from unittest import mock

import jax.numpy as jnp
import pytest

from mqa_jax.attention import inputs_of
from mqa_jax.kernels import gpu
from mqa_jax.kernels.gpu import ARCHITECTURES
from mqa_jax.kernels.triton import tile_config
from mqa_jax.kernels.triton.tile_config import DIRECTIONS, KINDS, TileConfig


def inputs(rows=4096, columns=4096, features=128, value_features=None, dtype=jnp.bfloat16, precision=None):
    query = jnp.zeros((1, rows, 2, features), dtype)
    key = jnp.zeros((1, columns, 1, features), dtype)
    value = jnp.zeros((1, columns, 1, value_features or features), dtype)
    return inputs_of(query, key, value, precision=precision)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_call_finds_tiles(architecture):
    halves = [(dtype, None) for dtype in (jnp.bfloat16, jnp.float16)]
    singles = [(jnp.float32, precision) for precision in (None, "high", "TF32_TF32_F32_X3")]
    for direction, (dtype, precision) in itertools.product(DIRECTIONS, halves + singles):
        for features in (8, 64, 65, 128, 192, 256):
            with gpu.assuming(architecture):
                tiles = tile_config.choose(direction, inputs(features=features, dtype=dtype, precision=precision))
            assert tiles.rows <= 128
            assert tiles.columns <= 128


def test_every_entry_is_legal_and_has_a_reason():
    for entry in tile_config.table():
        tile_config.config_of(entry)  # raises
        assert len(entry["reason"]) > 10
        assert entry["architecture"] in ARCHITECTURES
        assert entry["direction"] in DIRECTIONS
        assert entry["dtype"] in KINDS


def test_the_larger_of_both_head_sizes_decides():
    with gpu.assuming("sm90"):
        choose = lambda **sizes: tile_config.choose("forward", inputs(**sizes))
        assert choose(features=64, value_features=128) == choose(features=128)
        assert choose(features=64) != choose(features=128)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_of_tf32_have_tiles_of_their_own(architecture):
    """Those of full float32, which are unrolled, would spill kilobytes on tensor cores."""
    choose = lambda precision: tile_config.choose("forward", inputs(dtype=jnp.float32, precision=precision))
    with gpu.assuming(architecture):
        assert len({choose(precision) for precision in ("highest", "high", "TF32_TF32_F32_X3")}) == 3
        assert choose("high") == choose("TF32_TF32_F32")


def test_tiles_are_no_larger_than_the_arrays():
    tiles = TileConfig(128, 64, 8, 3)
    assert tiles.fitted(4096, 4096) == tiles
    assert tiles.fitted(1, 4096) == TileConfig(16, 64, 4, 3)
    assert tiles.fitted(100, 17) == TileConfig(128, 32, 4, 3)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [(80, "sm80"), (86, "sm89"), (87, "sm80"), (89, "sm89"), (90, "sm90"), (103, "sm100"), (120, "sm89")],
)
def test_the_gpu_at_hand_decides(capability, architecture):
    with mock.patch.object(gpu, "capability_at_hand", return_value=capability):
        assert gpu.architecture_at_hand() == architecture
        with gpu.assuming("sm100"):
            assert gpu.architecture_at_hand() == "sm100"


def test_without_a_gpu_the_smallest_memory_decides():
    assert gpu.capability_at_hand() is None
    assert gpu.architecture_at_hand() == "sm89"
