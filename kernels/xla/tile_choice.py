"""Chooses the tiles of the plain-XLA kernels on a CPU by what they will compute: one small model of what they cost.

Time is counted in pairs: what one query head takes for one key of one query, in a product that is large enough. A
causal mask is computed where its tiles are, which is more than it leaves; with T = S = 4 tiles of 128:

    tiles of 128 x 128      1 . . .      10 of 16 tiles, of which the mask leaves 8
                            1 1 . .
                            1 1 1 .
                            1 1 1 1

Tiles are as even as possible: two for a length of 640 are 320 each, not 512 with one that is moved back inside the
array, which computes again what it covers twice.
"""

import functools
from dataclasses import dataclass

from mqa_jax.inputs import Sizes
from mqa_jax.shapes import Length

SYMBOL = 1 << 12  # a length that is a symbol (`jax.export`) counts as this
ALIGNED = 8  # rows and keys of a tile: a vector of AVX2
MIN_SIDE, MAX_SIDE = 128, 512  # rows of scores, and keys: the library multiplies fewer slower, and more only add waste
MAX_SCORES = 3 << 18  # of a step: 3 MiB for each array of scores


@dataclass(frozen=True)
class Costs:
    """What a step costs besides its pairs, in pairs.

    Attributes:
      start: of a step: the loop, slices, the calls of the library that multiplies.
      row: of a row of scores, per feature of a value: what is summed is rescaled.
      key: of a key, per feature of key and value: both are cut out and transposed.
      parallel_from: scores of a step from which products and exponentials run on all cores.
      parallel: what a pair costs then.
      in_cache: scores of a step that stay in the caches.
      spilled: what each further one costs besides.
    """

    start: float
    row: float
    key: float
    parallel_from: int
    parallel: float
    in_cache: int
    spilled: float


# Found by a search over 300 timed tiles on 2 cores with AVX-512, float32 (shapes of GPT-2, BERT, SmolLM2, Falcon, Llama
# and of 8/1 heads), then rounded: the order of neighbouring tiles is within the noise of those timings.
FORWARD = Costs(start=2e3, row=0.5, key=0.6, parallel_from=1 << 19, parallel=0.7, in_cache=1 << 14, spilled=0.75)
BACKWARD = Costs(start=2e3, row=0.3, key=0.3, parallel_from=1 << 18, parallel=0.9, in_cache=1 << 19, spilled=0.45)


def choose(size: Sizes, costs: Costs, is_causal: bool) -> tuple[int, int, int]:
    """Rows, columns and heads of the cheapest tile that is not too large."""
    shapes = [
        (rows, columns, heads)
        for rows in even_tiles(known(size.T), MIN_SIDE // size.G)
        for columns in even_tiles(known(size.S), MIN_SIDE)
        for heads in range(1, size.K + 1)
        if size.K % heads == 0
    ]
    scores = lambda rows, columns, heads: heads * size.G * rows * columns
    fits = [shape for shape in shapes if scores(*shape) <= MAX_SCORES] or [min(shapes, key=lambda x: scores(*x))]
    return min(fits, key=lambda shape: cost(size, costs, is_causal, *shape))


def cost(size: Sizes, costs: Costs, is_causal: bool, rows: int, columns: int, heads: int) -> float:
    """Of all steps of a batch row, in pairs."""
    scores = heads * size.G * rows * columns
    step = costs.start + scores * (costs.parallel if scores >= costs.parallel_from else 1)
    step += costs.spilled * max(0, scores - costs.in_cache)
    step += heads * (costs.row * size.G * rows * size.V + costs.key * columns * (size.H + size.V))
    return visits(known(size.T), known(size.S), rows, columns, is_causal) * (size.K // heads) * step


@functools.lru_cache(maxsize=1024)  # asked for each number of heads
def visits(T: int, S: int, rows: int, columns: int, is_causal: bool) -> int:
    """How many tiles one head visits; a causal mask is taken to end at the last key, as it does in training."""
    tiles = -(-S // columns)
    if not is_causal or T > S:
        return -(-T // rows) * tiles
    ends = (S - T + min(T, start + rows) for start in range(0, T, rows))
    return sum(-(-end // columns) for end in ends)


def even_tiles(length: int, least: int) -> list[int]:
    """Tiles as even as possible, of about `least` to MAX_SIDE: for 640 tokens, 320 224 160 128 if `least` is 128."""
    limits = (MAX_SIDE, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
    return list(dict.fromkeys(even(length, most) for most in limits if most >= min(least, MAX_SIDE)))


def even(length: int, most: int) -> int:
    """One of as few tiles as cover a length, of at most so many each; all but the last are alike."""
    count = -(-length // most)
    return min(length, -(-length // (count * ALIGNED)) * ALIGNED)


def known(length: Length) -> int:
    return length if isinstance(length, int) else SYMBOL
