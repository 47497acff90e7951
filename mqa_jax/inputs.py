"""One attention problem in normal form: what the checker makes and every implementation takes."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mqa_jax.dropout import Dropout
from mqa_jax.masks import Mask
from mqa_jax.shapes import Bias, Key, Query, Value


def static(default=None):
    """A dataclass field that is part of the compiled program, not one of its arrays."""
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """The arrays that have gradients.

    The score of a pair is `soft_cap(scale * q.k) + bias - alibi_slope * |query position - key position|`.
    Keys and values in 8 bits (`mqa_jax.quantization`) have scales, that belong to k and v in this.
    """

    query: Query
    key: Key
    value: Value
    bias: Bias | None = None
    alibi_slopes: Float[Array, " N"] | None = None
    sinks: Float[Array, " N"] | None = None
    key_scale: Float[Array, "B S K"] | None = None
    value_scale: Float[Array, "B S K"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Operands, and all that shapes the softmax without having a gradient.

    Attributes:
      residual: whether the caller wants the log-sum-exp.
      constant: in a backward pass, the names of the operands that nobody differentiates.
    """

    operands: Operands
    mask: Mask
    dropout: Dropout | None = None
    scale: float = static(1.0)
    logits_soft_cap: float | None = static()
    precision: jax.lax.PrecisionLike = static()
    residual: bool = static(True)
    constant: tuple[str, ...] = static(())

    def needs_gradient(self, name: str) -> bool:
        """Whether a backward pass has to compute the gradient of this operand."""
        return getattr(self.operands, name) is not None and name not in self.constant

    @property
    def sizes(self) -> "Sizes":
        *batch, rows, heads, features = self.operands.query.shape
        *_, columns, kv_heads, value_features = self.operands.value.shape
        return Sizes(math.prod(batch), rows, columns, heads, kv_heads, heads // kv_heads, features, value_features)

    @property
    def dtype(self) -> DTypeLike:
        return self.operands.query.dtype

    @property
    def score_dtype(self) -> DTypeLike:
        """Of scores, their softmax and every sum: float32, or float64 where the query is."""
        return jnp.float64 if self.dtype == jnp.float64 else jnp.float32

    @property
    def weight_dtype(self) -> DTypeLike:
        """Of the weights where they meet the values.

        With scales in them weights are as small as the values' last bit, which float16 would round to 0.
        """
        scaled_halves = self.operands.value_scale is not None and self.dtype == jnp.float16
        return jnp.bfloat16 if scaled_halves else self.dtype


@dataclass(frozen=True)
class Sizes:
    """Axis lengths under their letters (see `mqa_jax.shapes`)."""

    B: int
    T: int
    S: int
    N: int
    K: int
    G: int
    H: int
    V: int
