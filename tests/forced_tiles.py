"""Implementations whose tiles are chosen by a test, however small, so that small problems have many of them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

from mqa_jax import attention
from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels import platforms
from mqa_jax.kernels.triton import decode, grid, tile_config
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.kernels.triton.tile_config import TileConfig
from mqa_jax.kernels.xla import decode as xla_decode
from mqa_jax.kernels.xla.backward import backward_in_tiles
from mqa_jax.kernels.xla.decode import Steps, forward_few_queries
from mqa_jax.kernels.xla.forward import forward_in_tiles
from mqa_jax.kernels.xla.tangent import tangent_in_tiles
from mqa_jax.kernels.xla.tile import TileShape


@contextlib.contextmanager
def registered(kernels: platforms.Kernels) -> Iterator[str]:
    """The name under which these kernels can be called."""
    with mock.patch.dict(attention.IMPLEMENTATIONS, {"tiled": attention.Implementation(kernels)}):
        yield "tiled"


def plain_xla(shape: TileShape) -> platforms.Kernels:
    return plain_xla_with(lambda _: shape)


def plain_xla_with(tiles: Callable[[Sizes], TileShape]) -> platforms.Kernels:
    """With the tiles of a platform, whatever the platform."""

    def backward(inputs: Inputs, *saved: Any) -> Any:
        return functools.partial(backward_in_tiles, shape=tiles(inputs.sizes))(inputs, *saved)

    def tangent(inputs: Inputs, *saved: Any) -> Any:
        return functools.partial(tangent_in_tiles, shape=tiles(inputs.sizes))(inputs, *saved)

    return platforms.Kernels(lambda inputs: forward_in_tiles(inputs, tiles(inputs.sizes)), backward, tangent)


def few_queries(columns: int, on_cpu: bool) -> platforms.Kernels:
    """Blocks of so many keys; the other passes, which know no few queries, have tiles of as many."""
    cpu = Steps(columns, xla_decode.summed_scores, xla_decode.summed_values)
    steps = cpu if on_cpu else Steps(columns, xla_decode.plain_scores, xla_decode.plain_values)
    tiles = lambda size: TileShape(min(size.T, 2), columns, 1, upcast=on_cpu)
    return replace(plain_xla_with(tiles), forward=functools.partial(forward_few_queries, steps=steps))


def triton_kernels(interpret: bool) -> platforms.Kernels:
    return platforms.Kernels(
        functools.partial(triton.forward, interpret=interpret), functools.partial(triton.backward, interpret=interpret)
    )


@contextlib.contextmanager
def triton_tiles(most_queries: int = 16, max_programs: int = 64, **tiles: TileConfig) -> Iterator[None]:
    """These instead of the table's, by direction; up to how many queries the decoding kernel takes; how work is cut."""
    choose = lambda direction, inputs, rows=None: tiles[direction]
    with (
        mock.patch.object(tile_config, "choose", choose),
        mock.patch.object(decode, "MAX_QUERIES", most_queries),
        mock.patch.object(decode, "MIN_KEYS", 8),
        mock.patch.object(grid, "MAX_SHARED_PROGRAMS", max_programs),
    ):
        yield


def tiled(monkeypatch, shape: TileShape) -> str:
    """Registers the kernels with tiles of this shape, however small, under a name of their own."""
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "tiled", attention.Implementation(plain_xla(shape)))
    return "tiled"


def use_tiles(monkeypatch, **tiles: TileConfig) -> None:
    """These tiles instead of the table's, by direction."""
    monkeypatch.setattr(tile_config, "choose", lambda direction, inputs, rows=None: tiles[direction])


small = functools.partial(TileConfig, warps=4, stages=2)
SMALL = dict(
    forward=small(16, 32, defer_values=True),
    dq=small(16, 16),
    dkv=small(32, 16, features=16),
    dscore=small(16, 32),
    decode=small(16, 16),
)
