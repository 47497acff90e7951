"""The tiles that the plain-XLA kernels choose on CPUs, by the model of what they cost."""

import itertools

import numpy as np
import pytest

from mqa_jax.inputs import Sizes
from mqa_jax.kernels.xla import implementation as xla
from mqa_jax.kernels.xla import tile_choice

LENGTHS = [1, 7, 8, 17, 301, 511, 512, 513, 640, 777, 1024, 5000]


def sizes_of(T: int, S: int, N: int = 12, K: int = 12, H: int = 64) -> Sizes:
    return Sizes(1, T, S, N, K, N // K, H, H)


@pytest.mark.parametrize(("length", "most"), list(itertools.product(LENGTHS, [16, 96, 128, 512])))
def test_even_tiles_cover_a_length_with_as_few_as_can_be(length, most):
    tile = tile_choice.even(length, most)
    count = -(-length // most)
    assert tile <= min(length, most)
    assert -(-length // tile) <= count
    assert tile * count - length < tile_choice.ALIGNED * count  # what the last tile covers a second time
    assert tile == length or tile % tile_choice.ALIGNED == 0


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("T", "S", "rows", "columns"), [(40, 40, 16, 16), (37, 90, 16, 8), (64, 64, 64, 8), (5, 3, 2, 2)]
)
def test_visits_are_the_tiles_of_which_something_is_seen(T, S, rows, columns, is_causal):
    seen = np.tri(T, S, S - T, dtype=bool) if is_causal and T <= S else np.ones((T, S), bool)
    tiles = [
        seen[row : row + rows, column : column + columns].any()
        for row in range(0, T, rows)
        for column in range(0, S, columns)
    ]
    assert tile_choice.visits(T, S, rows, columns, is_causal) == sum(tiles)


COSTS = [tile_choice.HEADS_IN_TURN, tile_choice.HEADS_AT_ONCE, tile_choice.BACKWARD]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("heads", [(12, 12), (9, 3), (8, 1), (71, 1)])
@pytest.mark.parametrize("length", [640, 777, 1024, 4096])
def test_little_of_what_is_computed_is_hidden(length, heads, costs):
    """Tiles of 512 would compute 5 times what a causal mask of 640 leaves."""
    size = sizes_of(length, length, *heads)
    rows, columns, _ = tile_choice.choose(size, costs, is_causal=True)
    pairs = tile_choice.visits(length, length, rows, columns, True) * rows * columns
    assert pairs < 1.5 * length * (length + 1) / 2


@pytest.mark.parametrize(("costs", "heads"), [(tile_choice.HEADS_IN_TURN, 1), (tile_choice.HEADS_AT_ONCE, 12)])
def test_heads_share_a_tile_where_their_products_run_at_once(costs, heads):
    """GPT-2: 47 ms with one head in a tile, 32 with twelve, on two cores and JAX 0.12; the other way round on 0.10."""
    assert tile_choice.choose(sizes_of(640, 640), costs, is_causal=True)[2] == heads


@pytest.mark.parametrize("costs", COSTS)
def test_a_mask_decides_how_large_tiles_are(costs):
    size = sizes_of(512, 512, 8, 1)
    assert tile_choice.visits(512, 512, 512, 512, True) == 1
    causal, full = (tile_choice.cost(size, costs, mask, 128, 128, 1) for mask in (True, False))
    assert causal == pytest.approx(full * 10 / 16)
    assert xla.tiles_for_cpu(size, is_causal=True).rows < 512


@pytest.mark.parametrize(
    ("lengths", "heads", "tile"),
    [
        ((2048, 2048), (8, 1), (128, 128, 1)),
        ((640, 640), (12, 12), (128, 128, 1)),
        ((129, 200), (9, 3), (72, 104, 1)),  # as even as possible
        ((1024, 1024), (71, 1), (80, 128, 1)),  # a large group: fewer queries
        ((1, 4096), (32, 8), (1, 128, 8)),  # few queries: all heads
        ((7, 13), (4, 2), (7, 13, 2)),
    ],
)
def test_tiles_of_tangents(lengths, heads, tile):
    found = xla.tiles_of_tangents_for_cpu(sizes_of(*lengths, *heads))
    assert (found.rows, found.columns, found.heads) == tile
    assert found.rows * found.columns * found.heads * heads[0] // heads[1] <= tile_choice.MAX_SCORES
