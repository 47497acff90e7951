"""The plain-XLA implementation: which of its two forward passes runs, with which tiles, on which platform."""

import functools

from jax import core, lax

from mqa_jax.inputs import Inputs, Operands, Sizes
from mqa_jax.kernels import xla_backward, xla_decode, xla_forward
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.xla_tile import TileShape
from mqa_jax.shapes import Length, LogSumExp, Output


def forward(inputs: Inputs) -> tuple[Output, Normalizer]:
    return lax.platform_dependent(inputs, cpu=_forward_on_cpu, default=_forward_on_accelerator)


def backward(inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp) -> Operands:
    arguments = inputs, out, normalizer, d_out, d_log_sum_exp
    with_tiles = lambda tiles: functools.partial(xla_backward.backward, shape=tiles(inputs.sizes))
    return lax.platform_dependent(*arguments, cpu=with_tiles(tiles_for_cpu), default=with_tiles(tiles_for_accelerator))


def tiles_for_cpu(size: Sizes) -> TileShape:
    """Measured on 2 AVX2 cores, float32, H = 64 and 128.

    A product runs on all cores only from about 2**17 scores on, and slows down once scores leave the caches, beyond
    2**19. A causal mask wastes half a tile of each row: heads fill a tile better than rows do, where there are heads.
    """
    few = 512 if size.G <= 2 else 256
    rows = min(_length(size.T), max(64, min(few, 2048 // size.G // 8 * 8)))
    columns = 128 if rows * size.G > 2048 else few
    if rows * size.G < 128:  # few rows: wider, so that the work of a step still outweighs its start
        columns = 512
    columns = min(_length(size.S), columns)
    return _tile(size, rows, columns, scores=3 << 18, upcast=True)


def tiles_for_accelerator(size: Sizes) -> TileShape:
    """Every step starts several GPU kernels, so steps are large: up to 2**25 scores, 128 MiB. Not tuned on a device."""
    return _tile(size, min(_length(size.T), 512), min(_length(size.S), 1024), scores=1 << 25, upcast=False)


def _tile(size: Sizes, rows: int, columns: int, scores: int, upcast: bool) -> TileShape:
    """No larger than the arrays: for a length that is a symbol that is settled when it gets its value."""
    heads = _heads(size, rows, columns, scores)
    return TileShape(core.min_dim(size.T, rows), core.min_dim(size.S, columns), heads, upcast)


def _length(n: Length, symbol: int = 1 << 20) -> int:
    """For choosing tiles: a length that is a symbol (`jax.export`) counts as a large one."""
    return n if isinstance(n, int) else symbol


def _heads(size: Sizes, rows: int, columns: int, scores: int) -> int:
    """The largest divisor of K that keeps a tile within `scores`, at least 1."""
    fits = lambda heads: size.K % heads == 0 and heads * size.G * rows * columns <= scores
    return max(filter(fits, range(1, size.K + 1)), default=1)


def steps_for_cpu(size: Sizes) -> xla_decode.Steps:
    """Measured on 2 AVX2 cores, float32, H = 64: steps of 2**14 to 2**16 scores are alike.

    At most 512 keys, as a short row takes a whole block; and a multiple of 8, which `summed_values` adds up together.
    """
    columns = max(8, min(512, (1 << 15) // (_length(size.B, symbol=1) * size.T * size.N)) // 8 * 8)
    columns = min(columns, size.S // 8 * 8) or size.S
    return xla_decode.Steps(columns, xla_decode.summed_scores, xla_decode.summed_values)


def steps_for_accelerator(size: Sizes) -> xla_decode.Steps:
    return xla_decode.Steps(size.S, xla_decode.plain_scores, xla_decode.plain_values)


def _forward_on_cpu(inputs: Inputs) -> tuple[Output, Normalizer]:
    size = inputs.sizes
    # Measured on 2 AVX2 cores: beyond 16 rows, transposing a tile of keys costs less than multiplying by hand; and a
    # step of up to 3 heads has too little to do.
    few = _length(size.T) * size.G <= 16 and _length(size.B) * size.K > 3
    if few and isinstance(size.S, int):  # blocks of a constant length
        return xla_decode.forward(inputs, steps_for_cpu(size))
    return xla_forward.forward(inputs, tiles_for_cpu(size))


def _forward_on_accelerator(inputs: Inputs) -> tuple[Output, Normalizer]:
    size = inputs.sizes
    if size.T == 1 and inputs.operands.key_scale is None:  # in one block all of 8-bit keys would be converted
        return xla_decode.forward(inputs, steps_for_accelerator(size))
    return xla_forward.forward(inputs, tiles_for_accelerator(size))
