"""Which attention weights dropout keeps: a pure function of (key, batch row, head, query row, key column).

The generator is counter-based, so every implementation, tile size and pass drops the same entries and nothing is stored
for the backward pass. The mixer is `lowbias32` (Chris Wellons, "Prospecting for Hash Functions", 2018), two 32-bit
multiplications, which give the same bits in XLA, in a GPU kernel and in numpy. One 32-bit word serves two neighbouring
columns, 16 bits each, so a kernel that handles both computes one hash; the rate is therefore rounded to 1/65536.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt32

LEVELS = 1 << 16  # number of values of the 16 random bits of one weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropout:
    """The parameters of `keep`.

    Attributes:
      seed: uint32 `[2]`.
      batch: int32 `[B]`, the number of each batch row.
      threshold: how many of LEVELS mean that the weight is dropped; static.
      first: int32 `[3]`, the numbers of the first head, query row and key column where the arrays are a part of larger
        ones; None is 0, 0, 0.
    """

    seed: UInt32[Array, "2"] = field(metadata={"for_all_rows": True})
    batch: Int[Array, " B"]
    threshold: int = field(metadata={"static": True})
    first: Int[Array, "3"] | None = field(default=None, metadata={"for_all_rows": True})

    @classmethod
    def make(cls, rng: PRNGKeyArray, rate: float, batch: Int[Array, "..."]) -> "Dropout":
        return cls(jax.random.bits(rng, (2,), jnp.uint32), batch, round(rate * LEVELS))

    def numbers_of_first(self) -> Int[Array, "3"]:
        return jnp.zeros(3, jnp.int32) if self.first is None else self.first

    def with_first(self, *, head: Array | int = 0, row: Array | int = 0, column: Array | int = 0) -> "Dropout":
        """For a part of these arrays, of which the first head, query row and key column have these numbers in them."""
        numbers = jnp.stack([jnp.asarray(number, jnp.int32) for number in (head, row, column)])
        return replace(self, first=self.numbers_of_first() + numbers)

    @property
    def scale(self) -> float:
        """The factor of kept weights, which preserves the mean; 0 where nothing is kept."""
        return LEVELS / (LEVELS - self.threshold) if self.threshold < LEVELS else 0.0


def keep(dropout: Dropout, batch: Array, head: Array, row: Array, column: Array) -> Bool[Array, "..."]:
    """True where a weight is kept. The indices are integers that broadcast against each other."""
    unsigned = lambda index: jnp.asarray(index).astype(jnp.uint32)
    head, row, column = map(unsigned, (head, row, column))
    if dropout.first is not None:
        head, row, column = (index + unsigned(first) for index, first in zip((head, row, column), dropout.first))
    stream = _mix(dropout.seed[1] + unsigned(batch))
    stream = _mix(dropout.seed[0] ^ stream)
    stream = _mix(stream + head * _GOLDEN)
    stream = _mix(stream ^ row)
    word = _mix(stream + (column >> 1) * _GOLDEN)
    half = (word >> ((column & 1) * 16)) & np.uint32(LEVELS - 1)
    return half >= np.uint32(dropout.threshold) if dropout.threshold < LEVELS else jnp.zeros(half.shape, bool)


_GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio: consecutive multiples differ in many bits


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)
