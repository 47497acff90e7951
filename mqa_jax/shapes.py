"""The axis letters of every signature, docstring, einsum and comment of this library.

    B  batch: any number of leading axes, none included, written `...` or `*B`
    T  query positions ("target")
    S  key and value positions ("source")
    N  query heads
    K  key/value heads; K divides N
    G  query heads that share one key/value head, G = N / K
    H  features of one query or key head
    V  features of one value head (usually H)
    D  features of the model

K == N is multi-head attention (Vaswani et al. 2017, arXiv 1706.03762), K == 1 multi-query attention (Shazeer 2019,
arXiv 1911.02150), anything between grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245). Query head n reads
key/value head n // G:

    n    0 1 2 3 4 5 6 7      N = 8, K = 2, G = 4
    k    0 0 0 0 1 1 1 1

The aliases below name arrays after the leading axes have been flattened into one B; `#X` may also have size 1.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Real

Query = Float[Array, "B T N H"]
Key = Real[Array, "B S K H"]  # int8 where quantized
Value = Real[Array, "B S K V"]
Output = Float[Array, "B T N V"]
LogSumExp = Float[Array, "B T N"]
Bias = Float[Array, "#B #N #T #S"]
BoolMask = Bool[Array, "#B #N #T #S"]
Positions = Int[Array, " X"]
Length = Any  # an int, or a symbol of `jax.export`


def positions(length: Length) -> Positions:
    """0, 1, 2, ... in 32 bits, also with `jax_enable_x64`."""
    return jnp.arange(length, dtype=jnp.int32)
