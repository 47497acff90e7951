"""The tiles that a Triton kernel may have: those that are worth compiling, for one entry of the table of tiles."""

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.model_shapes import SHAPES, ModelShape
from benchmarks.peers import jax_attention
from benchmarks.problems import Problem, attention_of
from mqa_jax.attention import inputs_of
from mqa_jax.inputs import Inputs
from mqa_jax.kernels import gpu, row_terms
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.kernels.triton import tile_config
from mqa_jax.kernels.triton.backward import Saved, d_key_and_value, d_query
from mqa_jax.kernels.triton.forward import forward_kernel
from mqa_jax.kernels.triton.score_gradient import d_bias
from mqa_jax.kernels.triton.tile_config import TileConfig

Kernel = Callable[[Inputs, Saved, TileConfig, bool], Any]
KERNELS: dict[str, Kernel] = {
    "forward": lambda inputs, saved, config, interpret: forward_kernel(inputs, config, interpret),
    "dq": d_query,
    "dkv": d_key_and_value,
    "dscore": d_bias,
}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "dscore": 2}  # of matrices, in each tile
MODELS = {64: "SmolLM2-135M", 128: "Llama-3-8B", 256: "Gemma-2B"}  # by head size, whose layers are timed
DTYPES = {"16-bit": "bfloat16", "float32": "float32", "tf32": "float32", "tf32x3": "float32"}  # by kinds of products
PRECISIONS = {"tf32": "TF32_TF32_F32", "tf32x3": "TF32_TF32_F32_X3"}  # that ask for them


@dataclass(frozen=True)
class Entry:
    """What is looked for: the tiles of one entry of the table, for the layer of a model.

    Attributes: shape, the layer's; that of MODELS if None.
    """

    direction: str
    dtype: str
    head_dim: int
    batch: int = 4
    length: int = 4096
    shape: ModelShape | None = None

    def __str__(self) -> str:
        return str(self.problem)

    @property
    def problem(self) -> Problem:
        shape = self.shape or SHAPES[MODELS[self.head_dim]]
        return attention_of(shape, self.batch, self.length, dtype=DTYPES[self.dtype])

    @property
    def key(self) -> dict[str, Any]:
        """What names it in the table."""
        return {
            "architecture": gpu.architecture_at_hand(),
            "direction": self.direction,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
        }

    @property
    def plain(self) -> bool:
        """As in the table: only the gradients of what is added to scores need a problem where something is."""
        return self.direction != "dscore"

    @property
    def flops(self) -> float:
        return self.problem.flops * PRODUCTS[self.direction] / PRODUCTS["forward"]

    def arguments(self, interpret: bool) -> tuple[Inputs, Saved]:
        query, key, value, d_out = jax_attention.on_device(self.problem)
        scores = (1, query.shape[2], self.length, self.length)
        bias = jax.random.normal(jax.random.key(4), scores, query.dtype) if self.direction == "dscore" else None
        inputs = inputs_of(query, key, value, bias, is_causal=True, precision=PRECISIONS.get(self.dtype))
        out, normalizer = jax.jit(functools.partial(triton.forward, interpret=interpret))(inputs)
        delta = row_terms.delta(out, d_out, jnp.zeros_like(normalizer.highest))
        return inputs, Saved(d_out, *(x.swapaxes(1, 2) for x in (*normalizer, delta)))


SIDES = {  # rows, columns
    ("forward", "16-bit"): ((64, 128), (32, 64, 128)),
    ("dq", "16-bit"): ((32, 64, 128), (32, 64, 128)),
    ("dkv", "16-bit"): ((32, 64, 128), (32, 64, 128)),
    ("dscore", "16-bit"): ((32, 64, 128), (32, 64, 128)),
    **{(direction, "float32"): ((16, 32, 64), (16, 32, 64)) for direction in KERNELS},
    **{(direction, "tf32"): ((16, 32, 64, 128), (16, 32, 64, 128)) for direction in KERNELS},
    **{(direction, "tf32x3"): ((16, 32, 64), (16, 32, 64)) for direction in KERNELS},
}
MAX_NUMBERS = 256  # float32 of a thread, which has 255 registers


def legal(entry: Entry) -> Iterator[TileConfig]:
    """All that is worth compiling. Products of float32 run without tensor cores, which leaves less to choose."""
    rows, columns = SIDES[entry.direction, entry.dtype]
    whole, half = entry.dtype == "float32", entry.dtype == "16-bit"
    stages = (1, 2, 3, 4) if half else (1, 2) if whole else (1, 2, 3)
    features = (32, 64) if whole else (64, 256) if entry.head_dim > 64 else (256,)
    if entry.direction == "dscore" and not (whole or half):
        features = (32, *features)
    defer = (False, True) if entry.direction == "forward" and half else (False,)
    on_hopper = entry.key["architecture"] == "sm90" and half
    settle = (False, True) if entry.direction == "dkv" and on_hopper else (False,)
    for choice in itertools.product(rows, columns, (4, 8), stages, features, defer, settle):
        config = TileConfig(*choice)
        if numbers_of_a_thread(entry, config) <= MAX_NUMBERS:
            yield config


def numbers_of_a_thread(entry: Entry, config: TileConfig) -> float:
    """Float32 that it holds at least: sums, and the tiles of scores and of their gradients."""
    tile = config.rows * config.columns
    sums = {
        "forward": config.rows * entry.head_dim,
        "dq": config.rows * entry.head_dim,
        "dkv": 2 * config.columns * entry.head_dim,
        "dscore": tile,
    }
    tiles = tile if entry.direction == "forward" else 2 * tile
    return (sums[entry.direction] + tiles) / (32 * config.warps)


def candidates(entry: Entry) -> list[TileConfig]:
    """Those that the table has now first: the others have to agree with them. Then in any order: time may end it."""
    fits = lambda found: found["head_dim"] >= entry.head_dim and (entry.plain or not found.get("plain"))
    serves = lambda found: fits(found) and {**found, "head_dim": entry.head_dim}.items() >= entry.key.items()
    present = [tile_config.config_of(found) for found in tile_config.table() if serves(found)][:1]
    others = sorted(legal(entry), key=str)
    random.Random(0).shuffle(others)
    return list(dict.fromkeys([*present, *others]))


TINY = [TileConfig(16, 16, warps=4, stages=1), TileConfig(32, 16, warps=4, stages=1)]
