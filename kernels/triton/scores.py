"""From products of queries and keys to scores, and from scores to weights.

Where a score is scale * q . k and nothing else, the scale is folded into the exponential: scores are then kept in units
of the scale (`score_unit`), which saves one multiplication for each.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mqa_jax import dropout
from mqa_jax.inputs import Inputs
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.triton import mask
from mqa_jax.kernels.triton.call import LOG2_E, divided, exp2_of_line, load
from mqa_jax.kernels.triton.io import load_head_numbers, load_row_numbers, load_scales
from mqa_jax.kernels.triton.pairs import load_pairs
from mqa_jax.kernels.triton.program import Place, Program

Scores = Float[Array, "..."]  # [bq, bk], or transposed


def is_only_scaled(inputs: Inputs) -> bool:
    """Whether a score is scale * q . k and nothing else."""
    operands = inputs.operands
    added = operands.bias is not None or operands.alibi_slopes is not None
    return not added and inputs.logits_soft_cap is None and inputs.scale > 0


def score_unit(inputs: Inputs) -> float:
    """The factor from the result of `scores` to scores."""
    return inputs.scale if is_only_scaled(inputs) else 1.0


def scores(program: Program, raw: Scores, place: Place, masked: bool) -> tuple[Scores, Scores | None]:
    """From q . k to scores / `score_unit`, -inf where hidden; and the tanh of the soft cap."""
    inputs, operands, tanh = program.inputs, program.inputs.operands, None
    if operands.key_scale is not None:
        raw = raw * load_scales(program, operands.key_scale, place.column, masked)
    if not is_only_scaled(inputs):
        raw = raw * inputs.scale
    if inputs.logits_soft_cap is not None:
        tanh = jnp.tanh(raw / inputs.logits_soft_cap)
        raw = tanh * inputs.logits_soft_cap
    if operands.bias is not None:
        raw = raw + load_pairs(program, operands.bias, place, masked).astype(jnp.float32)
    if operands.alibi_slopes is not None:
        slopes = load_head_numbers(program, operands.alibi_slopes, place.row)
        raw = raw - slopes * mask.distance(program, place)
    visible = mask.visible(program, place) if masked else None
    return raw if visible is None else jnp.where(visible, raw, -jnp.inf), tanh


def load_normalizer(program: Program, saved: Normalizer, row: Array, masked: bool) -> Normalizer:
    """A tile of `[B, N, T]`, with highest / `score_unit` for `weights`.

    Highest is +inf, so that the weights are 0, in rows that attend to no key and in rows outside the array.
    """
    highest = load_row_numbers(program, saved.highest, row, masked, other=-jnp.inf)
    highest = jnp.where(highest == -jnp.inf, jnp.inf, highest * (1 / score_unit(program.inputs)))
    return Normalizer(highest, load_row_numbers(program, saved.log_total, row, masked))


def weights(
    program: Program, scores: Scores, shift: Float[Array, "..."], log_total: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """exp(score - shift - log_total), where score and shift are / `score_unit`, and shift and log_total broadcast."""
    inputs = program.inputs
    if not is_only_scaled(inputs) or inputs.dtype == jnp.float32:
        return exp_of_difference(program, scores, shift, log_total)
    slope = score_unit(inputs) * LOG2_E  # one instruction less; its error is below the rounding of 16-bit weights
    total = 0.0 if log_total is None else log_total * LOG2_E
    return exp2_of_line(scores, slope, shift * -slope - total, program.interpret)


def exp_of_difference(
    program: Program, scores: Scores, shift: Float[Array, "..."], log_total: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """As `weights`, and exactly 1 where score and shift are equal, so that rescaling a sum by 1 does not change it.

    Subtracting first also prevents an overflow of finfo.min, the usual bias of a hidden pair.
    """
    total = jnp.zeros_like(shift) if log_total is None else log_total * -LOG2_E
    return exp2_of_line(scores - shift, score_unit(program.inputs) * LOG2_E, total, program.interpret)


def drop(program: Program, weights: Float[Array, "..."], place: Place) -> Float[Array, "..."]:
    """Dropout, of the weights or of their gradients."""
    spec = program.inputs.dropout
    if spec is None:
        return weights
    seed: Any = load(spec.seed, 0), load(spec.seed, 1)  # a kernel cannot index an array that it has loaded
    first: Any = None if spec.first is None else tuple(load(spec.first, i) for i in range(3))
    loaded, batch = replace(spec, seed=seed, first=first), load(spec.batch, program.batch)
    head = program.head
    if program.group > 1:
        head = head * program.group + divided(program.rows(place), program.group)[1]
    kept = dropout.keep(loaded, batch, head, program.queries_of_rows(place), program.columns(place))
    return jnp.where(kept, weights * spec.scale, 0.0)
