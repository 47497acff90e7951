"""The options of `mqa_jax.dot_product_attention` as one value, as the caller gave them."""

from dataclasses import dataclass

import jax
from jax.typing import ArrayLike


@dataclass(frozen=True, kw_only=True)
class Options:
    """See `mqa_jax.dot_product_attention` for what each means; `mqa_jax.checks` decides which values are legal."""

    scale: float | None = None
    is_causal: bool = False
    query_seq_lengths: ArrayLike | None = None
    key_value_seq_lengths: ArrayLike | None = None
    local_window_size: int | tuple[int, int] | None = None
    query_offset: ArrayLike = 0
    query_segment_ids: ArrayLike | None = None
    key_value_segment_ids: ArrayLike | None = None
    logits_soft_cap: float | None = None
    alibi_slopes: ArrayLike | None = None
    sinks: ArrayLike | None = None
    key_value_ring_lengths: ArrayLike | None = None
    key_scale: ArrayLike | None = None
    value_scale: ArrayLike | None = None
    dropout_rate: float = 0.0
    dropout_rng: jax.Array | None = None
    precision: jax.lax.PrecisionLike = None
