"""One attention problem in normal form: the checker returns it and every implementation takes it."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mqa_jax.dropout import Dropout
from mqa_jax.masks import Mask
from mqa_jax.pair_function import PairFunction
from mqa_jax.shapes import Bias, Key, Query, Value


def static(default=None):
    """A dataclass field that is part of the compiled program, not one of its arrays."""
    return field(default=default, metadata={"static": True})


def for_all_rows(default=None):
    """A field whose array has no batch axis; the arrays of all other fields start with one (`batch_axes`)."""
    return field(default=default, metadata={"for_all_rows": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Operands:
    """The arrays with respect to which attention is differentiable.

    The score of a pair is `score_fn(soft_cap(scale * q.k)) + bias - alibi_slope * |query position - key position|`.
    `score_arrays` are the floating point arrays of `score_fn`, in `score_dtype`; None if it has none.
    Keys and values in 8 bits (`mqa_jax.quantization`) have scales: k is key * key_scale, v is value * value_scale.
    """

    query: Query
    key: Key
    value: Value
    bias: Bias | None = None
    alibi_slopes: Float[Array, " N"] | None = for_all_rows()
    sinks: Float[Array, " N"] | None = for_all_rows()
    key_scale: Float[Array, "B S K"] | None = None
    value_scale: Float[Array, "B S K"] | None = None
    score_arrays: tuple[Float[Array, "..."], ...] | None = for_all_rows()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Operands, and everything else that the softmax depends on, which has no gradient.

    Attributes:
      score_fn: without the arrays that are in `operands`.
      residual: whether the log-sum-exp is returned.
      constant: in a backward pass, the names of the operands whose gradients are not needed.
      is_part: whether these keys are a part of those of a larger problem. Output and gradients, which are summed with
        those of the other parts, are then in `score_dtype`: rounded in each part they would err too much.
    """

    operands: Operands
    mask: Mask
    dropout: Dropout | None = None
    score_fn: PairFunction | None = None
    scale: float = static(1.0)
    logits_soft_cap: float | None = static()
    precision: jax.lax.PrecisionLike = static()
    residual: bool = static(True)
    constant: tuple[str, ...] = static(())
    is_part: bool = static(False)

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
        """The dtype of scores, their softmax and every sum: float32, or float64 for a float64 query."""
        return jnp.float64 if self.dtype == jnp.float64 else jnp.float32

    def dtype_of_gradient(self, operand: Array) -> DTypeLike:
        return self.score_dtype if self.is_part else operand.dtype

    @property
    def out_dtype(self) -> DTypeLike:
        return self.dtype_of_gradient(self.operands.query)

    @property
    def weight_dtype(self) -> DTypeLike:
        """The dtype of the weights in the product with the values.

        Weights that include the scales of 8-bit values may be too small for float16, which would round them to 0.
        """
        scaled_halves = self.operands.value_scale is not None and self.dtype == jnp.float16
        return jnp.bfloat16 if scaled_halves else self.dtype


@dataclass(frozen=True)
class Sizes:
    """Axis lengths, named by the letters of `mqa_jax.shapes`."""

    B: int
    T: int
    S: int
    N: int
    K: int
    G: int
    H: int
    V: int
