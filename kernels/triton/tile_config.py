"""The tile sizes of the GPU kernels: a table of measured or compiled entries, with a reason for each.

The table is `tile_table.json`; `python -m benchmarks.tune` times the legal choices on this machine's GPU and writes it.
"""

import functools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import gpu
from mqa_jax.kernels.triton import precision

DIRECTIONS = ("forward", "dq", "dkv", "dscore", "decode", "tangent")
KINDS = tuple(dict.fromkeys(precision.KINDS.values()))  # of products: they, not the dtype, select the tiles
TABLE = Path(__file__).with_name("tile_table.json")


@dataclass(frozen=True)
class TileConfig:
    """The tiles of one kernel.

    Attributes:
      rows: query positions, a power of two from 16.
      columns: keys, a power of two from 16.
      warps: number of warps of 32 threads; a power of two.
      features: the widest piece into which head sizes are split, a power of two from 16.
      stages: number of tiles that are being loaded or used at the same time; from 1.
      defer_values: forward only: multiply the weights of a tile with its values one step later, during the softmax of
        the next tile, so that tensor cores and exponentials overlap. Needs more registers.
      settle_sums: dK and dV only, for Hopper: complete the sums of a step before the next step starts. Otherwise Triton
        keeps their products in flight from one step to the next and across the end of the loop, where `ptxas` finds
        other writers of the same registers and serialises every wgmma of the kernel (its remark C7515).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    features: int = 256
    defer_values: bool = False
    settle_sums: bool = False

    def __post_init__(self) -> None:
        for name, smallest in (("rows", 16), ("columns", 16), ("features", 16), ("warps", 1)):
            number = getattr(self, name)
            if number < smallest or number & (number - 1):
                raise ValueError(f"{name} must be a power of two from {smallest} on: {name}={number}.")
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1: stages={self.stages}.")

    def fitted(self, rows: int, columns: int) -> "TileConfig":
        """Tiles no larger than the arrays; smaller tiles have at most four warps, because they cannot occupy eight."""
        rows, columns = min(self.rows, power_of_two(rows)), min(self.columns, power_of_two(columns))
        warps = self.warps if (rows, columns) == (self.rows, self.columns) else min(self.warps, 4)
        return replace(self, rows=rows, columns=columns, warps=warps)


def power_of_two(length: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (length - 1).bit_length())


def choose(direction: str, inputs: Inputs, rows: int | None = None) -> TileConfig:
    """The first entry of the table for these inputs and this architecture; `rows`: number of rows, by default T.

    An entry is for head sizes up to its own; an entry with `plain` is for inputs that are `is_plain`.
    """
    size = inputs.sizes
    features = max(size.H, size.V)
    kind = precision.KINDS[precision.products_of(inputs)]
    required = {"direction": direction, "dtype": kind, "architecture": gpu.architecture_at_hand()}
    for entry in table():
        fits = features <= entry["head_dim"] and (is_plain(inputs) or not entry.get("plain"))
        if fits and all(entry[key] == value for key, value in required.items()):
            return config_of(entry).fitted(rows or size.T, size.S)
    raise ValueError(
        f"{TABLE.name} has no tiles for {', '.join(f'{key}={value!r}' for key, value in required.items())}, "
        f"head_dim={features}. `python -m benchmarks.tune` writes them."
    )


def is_plain(inputs: Inputs) -> bool:
    """Whether scores are q . k and weights their softmax: other options need registers, which large tiles lack."""
    operands, mask = inputs.operands, inputs.mask
    extras = (operands.bias, operands.alibi_slopes, inputs.logits_soft_cap, inputs.dropout, mask.allowed)
    return all(extra is None for extra in (*extras, mask.query_segments))


def config_of(entry: dict[str, Any]) -> TileConfig:
    return TileConfig(**{field.name: entry[field.name] for field in fields(TileConfig) if field.name in entry})


@functools.cache
def table() -> list[dict[str, Any]]:
    """Entries from small to large head size."""
    return sorted(json.loads(TABLE.read_text())["entries"], key=lambda entry: entry["head_dim"])
