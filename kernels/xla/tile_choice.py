"""Chooses the tiles of the plain-XLA kernels on a CPU with a small cost model.

The unit of time is a pair: the time of one query head for one key of one query, in a large product. Under a causal mask
whole tiles are computed, which is more than the visible pairs; with T = S = 4 tiles of 128:

    tiles of 128 x 128      1 . . .      10 of 16 tiles are computed, for pairs of 8 tiles
                            1 1 . .
                            1 1 1 .
                            1 1 1 1

Tiles are as even as possible: two for a length of 640 have 320 each. With two of 512, the second moved back inside
the array, their overlap would be computed twice.
"""

import functools
from dataclasses import dataclass, replace

import jax

from mqa_jax.inputs import Sizes
from mqa_jax.shapes import Length

SYMBOL = 1 << 12
ALIGNED = 8  # rows and keys of a tile are multiples of this, a vector of AVX2
MIN_SIDE, MAX_SIDE = 128, 512  # rows of scores, and keys: products of fewer are slower, more only add masked pairs
MAX_SCORES = 3 << 18  # of a step: 3 MiB for each array of scores


@dataclass(frozen=True)
class Costs:
    """The costs of a step besides its pairs, in pairs.

    Attributes:
      start: of a step: the loop, slices, calls of the matrix library.
      row: of a row of scores, per feature of a value: its sum is rescaled.
      key: of a key, per feature of key and value: both are sliced and transposed.
      parallel_from: number of scores of a step from which products and exponentials run on all cores.
      parallel: cost of a pair in such a step.
      in_cache: number of scores of a step that fit into the caches.
      spilled: additional cost of each further score.
    """

    start: float
    row: float
    key: float
    parallel_from: int
    parallel: float
    in_cache: int
    spilled: float


# Fitted to the times of 300 tiles on 2 cores with AVX-512, float32 (shapes of GPT-2, BERT, SmolLM2, Falcon, Llama and
# of 8/1 heads), then rounded: differences between neighbouring tiles are within the noise of those timings.
# From JAX 0.11 on, XLA multiplies the heads of a step on all cores; before, one after the other. HEADS_AT_ONCE was
# fitted to 350 tiles with JAX 0.12.
HEADS_IN_TURN = Costs(start=2e3, row=0.5, key=0.6, parallel_from=1 << 19, parallel=0.7, in_cache=1 << 14, spilled=0.75)
HEADS_AT_ONCE = Costs(start=2e3, row=0.3, key=0.3, parallel_from=1 << 18, parallel=0.8, in_cache=1 << 19, spilled=0.2)
FORWARD = HEADS_AT_ONCE if jax.__version_info__ >= (0, 11) else HEADS_IN_TURN
BACKWARD = Costs(start=2e3, row=0.3, key=0.3, parallel_from=1 << 18, parallel=0.9, in_cache=1 << 19, spilled=0.45)


def choose(size: Sizes, costs: Costs, is_causal: bool) -> tuple[int, int, int]:
    """Rows, columns and heads of the cheapest tile that is not too large."""
    return cheapest(replace(size, B=1, T=known(size.T), S=known(size.S)), costs, is_causal)


@functools.lru_cache(maxsize=1024)  # without symbols of `jax.export`, which are not compared across exports
def cheapest(size: Sizes, costs: Costs, is_causal: bool) -> tuple[int, int, int]:
    shapes = [
        (rows, columns, heads)
        for rows in even_tiles(size.T, MIN_SIDE // size.G)
        for columns in even_tiles(size.S, MIN_SIDE)
        for heads in range(1, size.K + 1)
        if size.K % heads == 0
    ]
    scores = lambda rows, columns, heads: heads * size.G * rows * columns
    fits = [shape for shape in shapes if scores(*shape) <= MAX_SCORES] or [min(shapes, key=lambda x: scores(*x))]
    return min(fits, key=lambda shape: cost(size, costs, is_causal, *shape))


def cost(size: Sizes, costs: Costs, is_causal: bool, rows: int, columns: int, heads: int) -> float:
    """The cost of all steps of a batch row, in pairs."""
    scores = heads * size.G * rows * columns
    step = costs.start + scores * (costs.parallel if scores >= costs.parallel_from else 1)
    step += costs.spilled * max(0, scores - costs.in_cache)
    step += heads * (costs.row * size.G * rows * size.V + costs.key * columns * (size.H + size.V))
    return visits(size.T, size.S, rows, columns, is_causal) * (size.K // heads) * step


@functools.lru_cache(maxsize=1024)  # called for each number of heads
def visits(T: int, S: int, rows: int, columns: int, is_causal: bool) -> int:
    """How many tiles one head visits; a causal mask is assumed to end at the last key, as it does in training."""
    tiles = -(-S // columns)
    if not is_causal or T > S:
        return -(-T // rows) * tiles
    ends = (S - T + min(T, start + rows) for start in range(0, T, rows))
    return sum(-(-end // columns) for end in ends)


def even_tiles(length: int, min_size: int) -> list[int]:
    """Sizes of even tiles, from about `min_size` to MAX_SIDE: for 640 tokens, 320 216 160 128 if `min_size` is 128."""
    limits = (MAX_SIDE, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
    return list(dict.fromkeys(even(length, max_size) for max_size in limits if max_size >= min(min_size, MAX_SIDE)))


def even(length: int, max_size: int) -> int:
    """The size of the fewest tiles of at most `max_size` that cover a length; all but the last are equal."""
    count = -(-length // max_size)
    return min(length, -(-length // (count * ALIGNED)) * ALIGNED)


def known(length: Length, symbol: int = SYMBOL) -> int:
    """A length for choosing tiles: `symbol` where it is a symbol of `jax.export`."""
    return length if isinstance(length, int) else symbol
