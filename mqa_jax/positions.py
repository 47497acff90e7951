"""Positions: rotary embeddings (RoPE), ALiBi slopes, and position-dependent temperatures of queries.

A scaling of RoPE for longer contexts is a dataclass: it maps frequencies to new frequencies, and its `magnitude`
multiplies the rotated queries and keys.
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mqa_jax.setting_types import check_types, is_integer, is_number


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float

    magnitude = 1.0

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class TableScaling:
    """Frequency i divided by `factors[i]`; GGUF files store these in the tensor `rope_freqs.weight`."""

    factors: tuple[float, ...]

    magnitude = 1.0

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        if len(self.factors) != len(frequencies):
            raise ValueError(
                f"TableScaling has one factor for each pair of features: {len(self.factors)} factors, "
                f"head_dim={2 * len(frequencies)}."
            )
        return frequencies / np.asarray(self.factors)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's (`rope_type="llama3"`): low frequencies divided by `factor`, high ones kept, a ramp between them.

    Low: fewer than `low_freq_factor` turns in `original_max_position_embeddings`; high: more than `high_freq_factor`.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    magnitude = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                "low_freq_factor must be less than high_freq_factor: "
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}."
            )

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, `rope_type="yarn"`), with the names and defaults of transformers.

    Frequencies with fewer than `beta_slow` turns in `original_max_position_embeddings` are divided by `factor`, those
    with more than `beta_fast` turns are kept, and the factor changes linearly over the feature pairs between them.

    Attributes:
      factor: the new context length over the original one.
      original_max_position_embeddings: the original context length.
      attention_factor: `magnitude`. Default: 0.1 * log(factor) + 1 (section 3.4), or the quotient of two such numbers
        where `mscale` and `mscale_all_dim`, DeepSeek's factors of the logarithm, are both given.
      truncate: whether the ramp starts and ends at integer pair numbers.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_position_embeddings <= 0:
            raise ValueError(
                f"YarnScaling needs a positive factor and context: factor={self.factor}, "
                f"original_max_position_embeddings={self.original_max_position_embeddings}."
            )

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        temper = lambda scale: 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1
        return temper(self.mscale) / temper(self.mscale_all_dim) if self.mscale and self.mscale_all_dim else temper(1.0)

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        pairs = np.arange(len(frequencies))
        low, high = self._pair(frequencies, self.beta_fast), self._pair(frequencies, self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
        slow = np.clip((pairs - low) / (high - low if high != low else 0.001), 0, 1)  # 0.001 as in transformers
        return frequencies * (1 - slow + slow / self.factor)

    def _pair(self, frequencies: np.ndarray, turns: float) -> float:
        """The number, a float, of the feature pair with this many turns in the original context."""
        step = math.log(frequencies[0] / frequencies[1]) if len(frequencies) > 1 else math.inf
        return math.log(self.original_max_position_embeddings / (2 * math.pi * turns)) / step


Scaling = LinearScaling | TableScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), of queries and keys.

    Feature pair i of a head is rotated by position * theta ** (-2 i / H).

    Attributes:
      theta: base of the frequencies.
      interleaved: pair features (2i, 2i + 1), as GPT-J and GGUF files do, instead of (i, i + H / 2), as Hugging Face.
      scaling: of the frequencies for a longer context, or None. YaRN also multiplies by a magnitude.
    """

    theta: float = 10_000.0
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        check_types(self)

    def frequencies(self, features: int) -> np.ndarray:
        """Angle per position of each pair, float32 `[H / 2]`."""
        if features % 2:
            raise ValueError(f"RoPE rotates pairs of features, so head_dim must be even: head_dim={features}.")
        frequencies = self.theta ** (-np.arange(0, features, 2, dtype=np.float64) / features)
        return (frequencies if self.scaling is None else self.scaling(frequencies)).astype(np.float32)

    def __call__(self, x: Float[Array, "... T N H"], positions: Int[Array, "... T"]) -> Float[Array, "... T N H"]:
        """Rotates `x`, in float32 (float64 for float64), and returns it in its own dtype."""
        features, dtype = x.shape[-1], jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        positions = jnp.expand_dims(positions, range(x.ndim - 2 - positions.ndim))
        frequencies = jnp.expand_dims(self.frequencies(features).astype(dtype), range(x.ndim - 1))
        angle = positions[..., None, None].astype(dtype) * frequencies  # [..., T, 1, H/2]
        magnitude = 1.0 if self.scaling is None else self.scaling.magnitude
        cos, sin = jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude
        pairs = (*x.shape[:-1], features // 2, 2) if self.interleaved else (*x.shape[:-1], 2, features // 2)
        axis = -1 if self.interleaved else -2
        first, second = jnp.moveaxis(x.astype(dtype).reshape(pairs), axis, 0)
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=axis)
        return rotated.reshape(x.shape).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class TemperatureTuning:
    """Scales queries by 1 + attn_scale * log(floor((position + 1) / floor_scale) + 1) (Llama 4, llm-foundry)."""

    attn_scale: float = 0.1
    floor_scale: float = 8192

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, query: Float[Array, "... T N H"], positions: Int[Array, "... T"]) -> Float[Array, "... T N H"]:
        steps = jnp.floor((positions + 1).astype(jnp.float32) / self.floor_scale)
        factor = (1 + self.attn_scale * jnp.log(steps + 1))[..., None, None].astype(query.dtype)
        return query * jnp.expand_dims(factor, range(query.ndim - factor.ndim))


def alibi_slopes(heads: int, alibi_bias_max: float = 8) -> Float[Array, " N"]:
    """The slope of each head, float32 `[N]` (Press et al. 2021, arXiv 2108.12409; the values of MPT and mqa).

    2 ** (-alibi_bias_max * i / n) for i = 1 .. n, where n is `heads` rounded up to a power of two. If n > `heads`, the
    slopes of even i come first, then those of odd i, and the first `heads` of these are used.
    """
    if not (is_integer(heads) and heads >= 1 and is_number(alibi_bias_max) and alibi_bias_max > 0):
        raise ValueError(
            f"alibi_slopes needs heads >= 1 and alibi_bias_max > 0: heads={heads!r}, alibi_bias_max={alibi_bias_max!r}."
        )
    count = 2 ** math.ceil(math.log2(heads))
    slopes = 2.0 ** (-alibi_bias_max * np.arange(1, count + 1) / count)
    if count != heads:
        slopes = np.concatenate([slopes[1::2], slopes[0::2]])[:heads]
    return jnp.asarray(slopes, jnp.float32)


def falcon_alibi(heads: int, head_dim: int, length: int) -> Float[Array, "N 1 S"]:
    """Falcon's variant of ALiBi, a bias for each key: slope * position / sqrt(H), float32.

    It differs from ALiBi with slopes slope / sqrt(H) by a constant for each query, which does not change the softmax,
    and by rounding: slopes and products are bfloat16, so distant keys share a position (transformers,
    `build_alibi_tensor`).
    """
    rounded = functools.partial(
        jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7
    )  # XLA may remove a pair of casts
    slopes = rounded(alibi_slopes(heads))[:, None, None]
    return rounded(slopes * rounded(jnp.arange(length, dtype=jnp.float32))) / math.sqrt(head_dim)
