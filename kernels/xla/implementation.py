"""The plain-XLA implementation: selects the forward pass and the tiles for each platform."""

import functools

from jax import core, lax
from jaxtyping import Array

from mqa_jax.inputs import Inputs, Operands, Sizes
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.xla import decode, tile_choice
from mqa_jax.kernels.xla.backward import backward_in_tiles, score_arrays_in_tiles
from mqa_jax.kernels.xla.decode import forward_few_queries
from mqa_jax.kernels.xla.forward import forward_in_tiles
from mqa_jax.kernels.xla.tangent import tangent_in_tiles
from mqa_jax.kernels.xla.tile import TileShape
from mqa_jax.kernels.xla.tile_choice import known
from mqa_jax.shapes import LogSumExp, Output


def forward(inputs: Inputs) -> tuple[Output, Normalizer]:
    return lax.platform_dependent(inputs, cpu=_forward_on_cpu, default=_forward_on_accelerator)


def backward(inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp) -> Operands:
    arguments = inputs, out, normalizer, d_out, d_log_sum_exp
    with_tiles = lambda tiles: functools.partial(backward_in_tiles, shape=tiles)
    cpu = tiles_for_cpu(inputs.sizes, inputs.mask.is_causal, tile_choice.BACKWARD)
    return lax.platform_dependent(
        *arguments, cpu=with_tiles(cpu), default=with_tiles(tiles_for_accelerator(inputs.sizes))
    )


def tangent(inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands) -> tuple[Output, LogSumExp]:
    arguments = inputs, out, normalizer, tangents
    on_cpu = functools.partial(tangent_in_tiles, shape=tiles_of_tangents_for_cpu(inputs.sizes))
    return lax.platform_dependent(*arguments, cpu=on_cpu, default=tangent_on_accelerators)


def tangent_on_accelerators(
    inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands
) -> tuple[Output, LogSumExp]:
    return tangent_in_tiles(inputs, out, normalizer, tangents, tiles_for_accelerator(inputs.sizes))


def d_score_arrays(
    inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp
) -> tuple[Array, ...]:
    """The gradients of the arrays of `score_fn` alone, which kernels for GPUs do not compute."""
    tiles = _tiles_of(inputs.sizes, scores=1 << 22)  # 16 MiB: memory that nothing else there needs
    return score_arrays_in_tiles(inputs, out, normalizer, d_out, d_log_sum_exp, tiles)


def tiles_for_cpu(size: Sizes, is_causal: bool = True, costs: tile_choice.Costs = tile_choice.FORWARD) -> TileShape:
    """The cheapest in the model of `tile_choice`; no larger than the arrays, also where their lengths are symbols."""
    rows, columns, heads = tile_choice.choose(size, costs, is_causal)
    return TileShape(core.min_dim(size.T, rows), core.min_dim(size.S, columns), heads, upcast=True)


def tiles_of_tangents_for_cpu(size: Sizes) -> TileShape:
    """128 x 128, fewer queries of large groups, all heads of few queries: with five products a tile, small ones win.

    The fastest of 20 to 30 tiles for each of five shapes on AVX-512, by up to a fifth (float32; GPT-2, SmolLM2, 8/1 and
    8/2 heads).
    """
    columns = tile_choice.even(known(size.S), tile_choice.MIN_SIDE)
    most = tile_choice.MAX_SCORES // (size.G * columns) // tile_choice.ALIGNED * tile_choice.ALIGNED
    most = max(tile_choice.ALIGNED, min(tile_choice.MIN_SIDE, most))
    rows = tile_choice.even(known(size.T), most)
    heads = _heads(size, rows, columns, scores=tile_choice.MIN_SIDE**2)
    return TileShape(core.min_dim(size.T, rows), core.min_dim(size.S, columns), heads, upcast=True)


def tiles_for_accelerator(size: Sizes) -> TileShape:
    """Every step starts several GPU kernels, so steps are large: up to 2**25 scores, 128 MiB. Not tuned on any GPU."""
    return _tiles_of(size, scores=1 << 25)


def _tiles_of(size: Sizes, scores: int) -> TileShape:
    rows, columns = min(known(size.T), 512), min(known(size.S), 1024)
    heads = _heads(size, rows, columns, scores)
    return TileShape(core.min_dim(size.T, rows), core.min_dim(size.S, columns), heads, upcast=False)


def _heads(size: Sizes, rows: int, columns: int, scores: int) -> int:
    """The largest divisor of K that keeps a tile within `scores`, at least 1."""
    fits = lambda heads: size.K % heads == 0 and heads * size.G * rows * columns <= scores
    return max(filter(fits, range(1, size.K + 1)), default=1)


def steps_for_cpu(size: Sizes) -> decode.Steps:
    """Measured on 2 AVX2 cores, float32, H = 64: steps of 2**14 to 2**16 scores are equally fast.

    At most 512 keys, because a short row computes a whole block; and a multiple of 8, the parts of `summed_values`.
    """
    columns = max(8, min(512, (1 << 15) // (known(size.B, symbol=1) * size.T * size.N)) // 8 * 8)
    columns = min(columns, size.S // 8 * 8) or size.S
    return decode.Steps(columns, decode.summed_scores, decode.summed_values)


def steps_for_accelerator(size: Sizes) -> decode.Steps:
    return decode.Steps(size.S, decode.plain_scores, decode.plain_values)


def _forward_on_cpu(inputs: Inputs) -> tuple[Output, Normalizer]:
    size = inputs.sizes
    # Measured on 2 AVX2 cores: beyond 16 rows, transposing a tile of keys costs less than `summed_scores`; and a step
    # of up to 3 heads is too small for it.
    in_blocks = known(size.T) * size.G <= 16 and known(size.B) * size.K > 3
    if in_blocks and isinstance(size.S, int):  # blocks have a constant length
        return forward_few_queries(inputs, steps_for_cpu(size))
    return forward_in_tiles(inputs, tiles_for_cpu(size, inputs.mask.is_causal))


def _forward_on_accelerator(inputs: Inputs) -> tuple[Output, Normalizer]:
    size = inputs.sizes
    if size.T == 1 and inputs.operands.key_scale is None:  # in one block all 8-bit keys would be converted
        return forward_few_queries(inputs, steps_for_accelerator(size))
    return forward_in_tiles(inputs, tiles_for_accelerator(size))
