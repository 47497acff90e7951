"""The ways attention is computed, each at sizes of several tiles: what the table of options and `fuzz` run through."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import covering
import forced_tiles
import option_space
import oracle

from mqa_jax.kernels.triton.tile_config import TileConfig
from mqa_jax.kernels.xla import implementation as xla
from mqa_jax.kernels.xla.tile import TileShape

FEWER: covering.Choices = option_space.OPTIONS | dict(window=(None, "past", "right", "both"), scale=(None, -0.3))
FEWEST: covering.Choices = FEWER | dict(
    query_offset=(None, "each row"), window=(None, "past"), bias=(None, "ZNTS"), scale=(None,)
)
FEWER_LEADING_PAST: covering.Choices = option_space.LEADING_PAST | dict(mask=(None, "ZNTS", "ZS"))
FEWEST_LEADING_PAST: covering.Choices = option_space.LEADING_PAST | dict(mask=(None, "ZNTS"))

FEW = 4  # rows of several options, without every pair


@dataclass(frozen=True)
class Way:
    """One implementation.

    Attributes:
      structure: sizes, heads, leading axes, features and tiles to choose from.
      registered: the name under which dot_product_attention takes it, with these tiles, while a program is traced.
      tile: queries and keys of a tile, for masks that end in and around it.
      options, leading_past: see `option_space`.
      value_sets: how many problems go through each program.
      differentiated: whether gradients are judged as well.
      factor: of the floor of `oracle.judge_float32`; more where sums are long.
      pairs: whether every pair of options has a row, or only the few rows of several options that hold the most pairs.
      tiles_in_8_bits: those that `xla` or `triton` take for keys and values in 8 bits; by default all.
    """

    structure: covering.Choices
    registered: Callable[[Any], AbstractContextManager[str]]
    tile: Callable[[Any], tuple[int, int]]
    options: covering.Choices
    leading_past: covering.Choices
    value_sets: int = option_space.VALUE_SETS
    differentiated: bool = True
    factor: int = 4
    pairs: bool = True
    tiles_in_8_bits: tuple | None = None

    @functools.cached_property
    def table(self) -> list[covering.Row]:
        rows = option_space.table(self.structure, self.options, self.leading_past)
        alone = covering.each_alone(self.options | self.leading_past | self.structure)
        return rows if self.pairs else rows[: len(alone) + FEW]

    @property
    def table_in_8_bits(self) -> list[covering.Row]:
        """Every choice with keys and values in int8, and in float8_e4m3fn."""
        choices = {"bits": ("int8", "float8_e4m3fn")} | self.options | self.leading_past | self.structure
        choices["tiles"] = self.tiles_in_8_bits or choices["tiles"]
        exist = option_space.exists
        others = [pair for pair in covering.every_pair(choices, exist) if "bits" not in dict(pair)]
        return covering.table(choices, exist, known=others)

    def problems(self, row: covering.Row) -> list[oracle.Problem]:
        """For one program."""
        found = [option_space.problem(row, self.tile(row["tiles"]), n) for n in range(self.value_sets)]
        return [oracle.quantized(problem, row["bits"]) for problem in found] if "bits" in row else found

    def results(self, row: covering.Row) -> list[dict[str, Any]]:
        """What the implementation makes of `problems`."""
        with self.registered(row["tiles"]) as name:
            return self._results(row, name)

    def expected(self, row: covering.Row) -> list[dict[str, Any]]:
        return self._results(row, "reference")

    def judge(self, results: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
        for number, (result, right) in enumerate(zip(results, expected, strict=True)):
            try:
                oracle.judge_float32(result, right, self.factor)
            except AssertionError as error:
                error.add_note(f"in value set {number}")
                raise

    def _results(self, row: covering.Row, name: str) -> list[dict[str, Any]]:
        problems, differentiated = self.problems(row), self.differentiated and "bits" not in row
        compute = oracle.program_for_values(problems[0], name, differentiated)
        return [compute(problem) for problem in problems]


def small_tiles(tiles: tuple[int, int, int, bool]) -> AbstractContextManager[str]:
    """Of plain XLA: queries, keys, key/value heads, and whether products are in float32, as on CPUs."""
    return forced_tiles.registered(forced_tiles.plain_xla(TileShape(*tiles)))


def tiles_of_platform(platform: str) -> AbstractContextManager[str]:
    tiles: Any = {"cpu": xla.tiles_for_cpu, "accelerator": xla.tiles_for_accelerator}[platform]
    return forced_tiles.registered(forced_tiles.plain_xla_with(tiles))


def blocks(tiles: tuple[int, bool]) -> AbstractContextManager[str]:
    """Of few queries: keys, and whether products are those of CPUs."""
    return forced_tiles.registered(forced_tiles.few_queries(*tiles))


@contextlib.contextmanager
def triton(tiles: tuple[int, int, int, bool, int], most_queries: int = 0, interpret: bool = True) -> Iterator[str]:
    """Queries, keys, features of a piece, whether products wait or not where they may, and how work is cut."""
    rows, columns, features, wait, programs = tiles
    small = functools.partial(TileConfig, warps=4, stages=2, features=features)
    configs = dict(
        forward=small(rows, columns, defer_values=wait),
        dq=small(columns, rows),
        dkv=small(columns, rows, settle_sums=wait),
        dscore=small(rows, columns),
        decode=small(rows, columns),
        tangent=small(rows, columns),
    )
    forced = forced_tiles.triton_tiles(most_queries, programs, **configs)
    with forced, forced_tiles.registered(forced_tiles.triton_kernels(interpret)) as name:
        yield name


_OF_SMALL = dict(heads=option_space.HEADS, batch=option_space.BATCHES, features=option_space.FEATURES)

WAYS = {
    "xla": Way(
        _OF_SMALL
        | dict(
            sizes=((61, 83), (83, 53), (64, 64), (57, 64)),
            tiles=((8, 16, 1, True), (16, 8, 1, False), (13, 11, 1, True)),
        ),
        small_tiles,
        lambda tiles: tiles[:2],
        option_space.OPTIONS,
        option_space.LEADING_PAST,
    ),
    "xla, few queries": Way(  # both tiles divide 48 and 72, which takes other code: so pairs of options are enough
        _OF_SMALL | dict(sizes=((3, 53), (1, 48), (4, 72)), tiles=((12, True), (8, False))),
        blocks,
        lambda tiles: (2, tiles[0]),
        FEWER,
        FEWER_LEADING_PAST,
        tiles_in_8_bits=((12, True),),
    ),
    "xla, tiles of CPUs": Way(  # 256 x 256 for four heads in a group
        dict(heads=((4, 1),), batch=((2,),), features=((3, 5),), sizes=((700, 900), (768, 768)), tiles=("cpu",)),
        tiles_of_platform,
        lambda tiles: (256, 256),
        FEWEST,
        FEWEST_LEADING_PAST,
        value_sets=2,
        factor=8,
        pairs=False,  # "xla" has them, in tiles that differ in nothing but their sizes
    ),
    "xla, tiles of accelerators": Way(  # 512 x 1024
        dict(heads=((1, 1),), batch=((2,),), features=((3, 5),), sizes=((1100, 2100),), tiles=("accelerator",)),
        tiles_of_platform,
        lambda tiles: (512, 512),
        FEWEST,
        FEWEST_LEADING_PAST,
        value_sets=2,
        factor=8,
        pairs=False,  # "xla" has them, in tiles that differ in nothing but their sizes
    ),
    "triton": Way(
        _OF_SMALL | dict(sizes=((67, 83), (83, 64), (96, 96)), tiles=((16, 32, 256, True, 64), (32, 16, 16, False, 1))),
        triton,
        lambda tiles: tiles[:2],
        FEWER,
        FEWER_LEADING_PAST,
    ),
    "triton, few queries": Way(
        _OF_SMALL | dict(sizes=((3, 83), (11, 83), (5, 64)), tiles=((16, 32, 256, True, 64), (16, 16, 16, False, 64))),
        functools.partial(triton, most_queries=16),
        lambda tiles: tiles[:2],
        FEWEST | dict(window=(None, "past", "both"), bias=(None, "ZNTS", "ZS")),
        FEWEST_LEADING_PAST,
        differentiated=False,
    ),
}


def compiled(name: str, value_sets: int = 2) -> Way:
    """A way of Triton on a GPU, be it an emulated one, instead of interpreted."""
    registered: Any = WAYS[name].registered
    return replace(WAYS[name], registered=functools.partial(registered, interpret=False), value_sets=value_sets)
