"""How large the tiles of a GPU kernel are: a small table, measured or compiled for, with a reason for each entry.

`tile_table.json` holds it; `python -m benchmarks.tune` times the legal choices on the GPU at hand and rewrites it.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import triton_precision

DIRECTIONS = ("forward", "dq", "dkv", "dscore", "decode")
KINDS = tuple(dict.fromkeys(triton_precision.KINDS.values()))  # of products, which decide more than the dtype does
ARCHITECTURES = ("sm80", "sm89", "sm90", "sm100")  # A100; L40S, RTX 40; H100, H200; B200
TABLE = Path(__file__).with_name("tile_table.json")


@dataclass(frozen=True)
class TileConfig:
    """The tiles of one kernel.

    Attributes:
      rows: query positions, a power of two from 16.
      columns: keys, a power of two from 16.
      warps: of 32 threads; a power of two.
      features: the widest piece that head sizes are cut into, a power of two from 16.
      stages: tiles that are on their way from memory at once, and the one in use; from 1.
      defer_values: forward only: multiply the weights of a tile with its values one step later, beside the softmax of
        the next tile, so that tensor cores and exponentials are busy at once. Costs registers.
      settle_sums: dK and dV only, for Hopper: have the sums of a step before the next one starts. Else Triton leaves
        their products running from one step to the next and across the end of the loop, where `ptxas` finds other
        writers of the same registers and serialises every wgmma of the kernel (its remark C7515).
    """

    rows: int
    columns: int
    warps: int
    stages: int
    features: int = 256
    defer_values: bool = False
    settle_sums: bool = False

    def __post_init__(self) -> None:
        for name, least in (("rows", 16), ("columns", 16), ("features", 16), ("warps", 1)):
            number = getattr(self, name)
            if number < least or number & (number - 1):
                raise ValueError(f"{name} must be a power of two from {least} on: {name}={number}.")
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1: stages={self.stages}.")

    def fitted(self, rows: int, columns: int) -> "TileConfig":
        """No larger than the arrays; small tiles do not keep eight warps busy."""
        rows, columns = (min(mine, power_of_two(whole)) for mine, whole in ((self.rows, rows), (self.columns, columns)))
        warps = self.warps if (rows, columns) == (self.rows, self.columns) else min(self.warps, 4)
        return replace(self, rows=rows, columns=columns, warps=warps)


def power_of_two(length: int) -> int:
    """The next one, from 16 on."""
    return max(16, 1 << (length - 1).bit_length())


def choose(direction: str, inputs: Inputs, rows: int | None = None) -> TileConfig:
    """The first entry of the table for these inputs on the architecture at hand; `rows` of a tile, if not queries.

    An entry holds for head sizes up to its own; one that says `plain` only where `is_plain`.
    """
    size = inputs.sizes
    features = max(size.H, size.V)
    kind = triton_precision.KINDS[triton_precision.products_of(inputs)]
    wanted = {"direction": direction, "dtype": kind, "architecture": architecture_at_hand()}
    for entry in table():
        fits = features <= entry["head_dim"] and (is_plain(inputs) or not entry.get("plain"))
        if fits and all(entry[key] == value for key, value in wanted.items()):
            return config_of(entry).fitted(rows or size.T, size.S)
    raise ValueError(
        f"{TABLE.name} has no tiles for {', '.join(f'{key}={value!r}' for key, value in wanted.items())}, "
        f"head_dim={features}. `python -m benchmarks.tune` writes them."
    )


def is_plain(inputs: Inputs) -> bool:
    """Whether scores are q . k and weights their softmax: anything else needs registers, which large tiles lack."""
    operands, mask = inputs.operands, inputs.mask
    extras = (operands.bias, operands.alibi_slopes, inputs.logits_soft_cap, inputs.dropout, mask.allowed)
    return all(extra is None for extra in (*extras, mask.query_segments))


def config_of(entry: dict[str, Any]) -> TileConfig:
    return TileConfig(**{field.name: entry[field.name] for field in fields(TileConfig) if field.name in entry})


@functools.cache
def table() -> list[dict[str, Any]]:
    """Entries from small to large head size."""
    return sorted(json.loads(TABLE.read_text())["entries"], key=lambda entry: entry["head_dim"])


# -- the GPU ----------------------------------------------------------------------------------------------------------

_assumed = jax.make_user_context(None)  # an architecture; what is traced under one is not reused under another


@contextlib.contextmanager
def assuming(architecture: str) -> Iterator[None]:
    """Traces for this architecture, whatever GPU is at hand: to compile for another machine."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {ARCHITECTURES}: architecture={architecture!r}.")
    with _assumed(architecture):
        yield


def is_assumed() -> bool:
    return _assumed.value is not None


def architecture_at_hand() -> str:
    """The one assumed, or that of the first GPU, or else the one with the least memory, whose tiles fit the others."""
    return _assumed.value or nearest_architecture(capability_at_hand() or 89)


def capability() -> int | None:
    """Compute capability x 10 of what is compiled for: the GPU assumed, or at hand."""
    return capability_at_hand() if _assumed.value is None else int(_assumed.value[2:])


@functools.cache
def capability_at_hand() -> int | None:
    """Compute capability x 10 of the first NVIDIA GPU; None without one."""
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.local_devices()[0], "compute_capability", "")
    return round(10 * float(capability)) if capability.replace(".", "").isdigit() else None


def nearest_architecture(capability: int) -> str:
    """The newest in the table that is no newer and has no more memory: RTX 30 (8.6) and RTX 50 (12.0) have sm89's."""
    if capability == 86 or capability >= 120:
        return "sm89"
    return [name for name in ARCHITECTURES if int(name[2:]) <= capability][-1]
