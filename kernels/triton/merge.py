"""Merges attention over several parts of the keys, as `mqa_jax.merge_partials` does, in one Triton kernel.

XLA would start three kernels, and starting one takes about as long as running it. A program owns some features of one
query and head, and reads the results of all parts for them at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import online_softmax
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.triton.call import divided, kernel_call, load, program_id, span, store
from mqa_jax.kernels.triton.tile_config import TileConfig, power_of_two
from mqa_jax.shapes import Output

MAX_NUMBERS = 4096  # in a program, 32 for each thread: programs are small, because there may be only one query


def merge(
    inputs: Inputs, outs: Float[Array, "P B TG K V"], normalizers: Normalizer, interpret: bool
) -> tuple[Output, Normalizer]:
    """P parts, packed (`pack`); their normalizers are `[P, B, K, TG]`."""
    size, parts = inputs.sizes, outs.shape[0]
    tile = tile_of(parts, size.V)

    def kernel(outs: Any, normalizers: Any, out: Any, normalizer: Any) -> None:
        batch, kv_head = divided(program_id(2), size.K)
        row, feature = program_id(1), program_id(0) * tile.columns
        position, member = divided(row, size.G)
        head = kv_head * size.G + member
        every, features = span(0, tile.rows), span(feature, tile.columns)
        part_exists = lax.iota(jnp.int32, tile.rows) < parts
        feature_exists = feature + lax.iota(jnp.int32, tile.columns) < size.V
        both_exist = jnp.broadcast_to(part_exists[:, None] & feature_exists[None], (tile.rows, tile.columns))

        each, log_totals = (load(x, every, batch, kv_head, row, where=part_exists) for x in normalizers)
        each = jnp.where(part_exists, each, -jnp.inf)
        highest = jnp.max(each, axis=0, keepdims=True)
        weights = jnp.exp(each - online_softmax.finite(highest) + log_totals)
        found = load(outs, every, batch, row, kv_head, features, where=both_exist)
        total, weighted = jnp.sum(weights, axis=0, keepdims=True), jnp.sum(weights[:, None] * found, axis=0)
        merged, result = online_softmax.finish(online_softmax.State(highest, total, weighted))
        store(out, merged, batch, position, head, features, where=feature_exists)
        first = jnp.broadcast_to(feature == 0, (1,))
        for into, number in zip(normalizer, result):
            store(into, number, batch, position, span(head, 1), where=first)

    number: Any = jax.ShapeDtypeStruct((size.B, size.T, size.N), jnp.float32)
    shapes = jax.ShapeDtypeStruct((size.B, size.T, size.N, size.V), inputs.out_dtype), Normalizer(number, number)
    grid = -(-size.V // tile.columns), size.T * size.G, size.B * size.K
    run = kernel_call("mqa_merge", kernel, grid, tile, shapes, interpret)
    return run(outs, normalizers)


def tile_of(parts: int, features: int) -> TileConfig:
    """The tile of a program: its rows are parts, its columns features."""
    rows = power_of_two(parts)
    columns = max(16, min(MAX_NUMBERS // rows, power_of_two(features)))
    return TileConfig(rows, columns, warps=4, stages=1)
