"""Few queries on many keys in plain XLA: the decoding step, whose time is that of reading the cache.

The keys are processed in blocks, for all batch rows and heads at once, with a running softmax. Only the blocks that
some row attends to are read. K/V are read in their layout, `[B, S, K, H]`: no transpose, no repeat, no copy. Scores are
`[B, c, K, T, G]`, c keys in a block. Where S is no multiple of c, the last block is moved back inside the array, and
the keys that it covers a second time are masked.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from mqa_jax import dropout, masks
from mqa_jax.inputs import Inputs, Sizes
from mqa_jax.kernels import online_softmax, tile_bounds
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.shapes import Key, Output, Value, positions

GroupedQuery = Float[Array, "B K T G H"]
BlockScores = Float[Array, "B c K T G"]
PartialOutputs = Float[Array, "B parts K T G V"]


@dataclass(frozen=True)
class Steps:
    """The functions of a step, and the number of its keys.

    Attributes:
      columns: keys in a block, c <= S.
      scores: q.k.
      values: weights @ values, in any number of parts; these are added up after the last block.
    """

    columns: int
    scores: Callable[[Inputs, GroupedQuery, Key], BlockScores]
    values: Callable[[Inputs, BlockScores, Value], PartialOutputs]


@dataclass(frozen=True)
class Block:
    """Keys [start, start + c), listed in `columns`; the block owns those from `owned` on. All int32."""

    start: Array
    owned: Array
    columns: Array

    @classmethod
    def number(cls, index: Array, length: int, sizes: Sizes) -> "Block":
        owned = jnp.asarray(index, jnp.int32) * length  # loops count in 64 bits where `jax_enable_x64` is set
        start = jnp.minimum(owned, sizes.S - length)
        return cls(start, owned, start + positions(length))

    def cut(self, x: Array, axis: int) -> Array:
        """The slice of the block's keys along an axis; an axis of size 1 stays."""
        if x.shape[axis] == 1:
            return x
        x, start = lax.optimization_barrier((x, self.start))  # or XLA would convert all of x, before the loop
        return lax.dynamic_slice_in_dim(x, start, self.columns.shape[0], axis)


def forward_few_queries(inputs: Inputs, steps: Steps) -> tuple[Output, Normalizer]:
    size = inputs.sizes
    query = inputs.operands.query.reshape(size.B, size.T, size.K, size.G, size.H).swapaxes(1, 2)
    of_block = lambda inputs: (
        lambda index, state: attend(inputs, steps, Block.number(index, steps.columns, size), query, state)
    )
    state = _empty_state(inputs, steps)
    if steps.columns == size.S:
        state = of_block(inputs)(jnp.int32(0), state)
    else:
        blocks = _BlockRange.seen(inputs, steps.columns)
        masked, step = of_block(inputs), of_block(replace(inputs, mask=_full(inputs.mask)))
        if inputs.mask.function is not None:
            masked = _unless_hidden(inputs, steps, masked)
        if inputs.mask.hides_pairs or inputs.mask.key_lengths is not None or size.S % steps.columns:
            full = step
            step = lambda index, state: lax.cond(blocks.is_full(index), full, masked, index, state)
        state = lax.fori_loop(blocks.start, blocks.stop, step, state)
    state = state._replace(weighted=jnp.sum(state.weighted, axis=1))
    out, normalizer = online_softmax.finish(state, _sinks_of_rows(inputs))
    return _ungroup(out, size).astype(inputs.out_dtype), jax.tree.map(lambda x: _ungroup(x, size)[..., 0], normalizer)


def attend(
    inputs: Inputs, steps: Steps, block: Block, query: GroupedQuery, state: online_softmax.State
) -> online_softmax.State:
    """Adds a block of keys to the running softmax, of which `weighted` has an axis of parts after B."""
    key, value = block.cut(inputs.operands.key, 1), block.cut(inputs.operands.value, 1)
    score = _masked(inputs, steps.scores(inputs, query, key) * inputs.scale, block)
    highest = jnp.maximum(state.highest, jnp.max(score, axis=1)[..., None])
    shift = online_softmax.finite(highest)
    weight, rescale = jnp.exp(score - shift[:, None, ..., 0]), jnp.exp(state.highest - shift)
    total = state.total * rescale + jnp.sum(weight, axis=1)[..., None]
    weight, value_scale = _drop(inputs, weight, block), inputs.operands.value_scale
    if value_scale is not None:
        weight = weight * _cleared(inputs, block.cut(value_scale, 1), block).astype(weight.dtype)[..., None, None]
    weighted = steps.values(inputs, weight, _cleared(inputs, value, block))
    return online_softmax.State(highest, total, state.weighted * rescale[:, None] + weighted)


def _unless_hidden(inputs: Inputs, steps: Steps, step: Callable) -> Callable:
    """Skips a block in which the mask hides all pairs, such as those between a beginning and a window."""

    def skipping(index: Array, state: online_softmax.State) -> online_softmax.State:
        visible = _visible(inputs, Block.number(index, steps.columns, inputs.sizes))
        assert visible is not None
        return lax.cond(jnp.any(visible), step, lambda index, state: state, index, state)

    return skipping


class _BlockRange(NamedTuple):
    """In blocks [start, stop) some pair is visible; in [full_start, full_stop) all pairs of all rows are visible."""

    start: Array
    full_start: Array
    full_stop: Array
    stop: Array

    @classmethod
    def seen(cls, inputs: Inputs, columns: int) -> "_BlockRange":
        size = inputs.sizes
        bounds = tile_bounds.key_tiles(inputs.mask, size, size.T, columns)[:, 0]
        start, full_start, full_stop, stop = bounds.T
        first = jnp.min(jnp.where(start < stop, start, stop.max()))
        return cls(first, jnp.max(full_start), jnp.min(full_stop), jnp.max(stop))

    def is_full(self, index: Array) -> Array:
        return (self.full_start <= index) & (index < self.full_stop)


def _full(mask: masks.Mask) -> masks.Mask:
    """The mask of blocks that are visible to all queries but padding: the whole mask would double a step's time."""
    return masks.Mask(query_offset=mask.query_offset, query_lengths=mask.query_lengths, ring=mask.ring)


def _empty_state(inputs: Inputs, steps: Steps) -> online_softmax.State:
    size, dtype = inputs.sizes, inputs.score_dtype
    heads = size.K, size.T, size.G
    weight = jax.ShapeDtypeStruct((size.B, steps.columns, *heads), dtype)
    value = jax.ShapeDtypeStruct((size.B, steps.columns, size.K, size.V), dtype)
    weighted = jnp.zeros(jax.eval_shape(functools.partial(steps.values, inputs), weight, value).shape, dtype)
    return online_softmax.State.empty(size.B, *heads, features=0, dtype=dtype)._replace(weighted=weighted)


def _masked(inputs: Inputs, score: BlockScores, block: Block) -> BlockScores:
    operands, size = inputs.operands, inputs.sizes
    if operands.key_scale is not None:
        score = score * block.cut(operands.key_scale, 1).astype(score.dtype)[..., None, None]
    if inputs.logits_soft_cap is not None:
        score = inputs.logits_soft_cap * jnp.tanh(score / inputs.logits_soft_cap)
    if inputs.score_fn is not None:
        score = _of_function(inputs, score, block)
    if operands.bias is not None:
        score = score + _as_scores(block.cut(operands.bias, 3), size).astype(score.dtype)
    if operands.alibi_slopes is not None:
        distance = _as_scores(masks.distance(inputs.mask, positions(size.T), block.columns), size).astype(score.dtype)
        score = score - _of_heads(operands.alibi_slopes, inputs)[:, None] * distance
    may_attend = _visible(inputs, block)
    return score if may_attend is None else jnp.where(may_attend, score, -jnp.inf)


def _of_function(inputs: Inputs, score: BlockScores, block: Block) -> BlockScores:
    """`score_fn` of the scores."""
    size, score_fn = inputs.sizes, inputs.score_fn
    assert score_fn is not None
    score_fn = score_fn.joined(inputs.operands.score_arrays)
    batch = score_fn.batch[:, None, None, None, None]
    head = positions(size.N).reshape(size.K, 1, size.G)
    query, key = (_as_scores(x, size) for x in masks.of_pairs(inputs.mask, positions(size.T), block.columns))
    return score_fn.function(score, batch, head, query, key, *score_fn.arrays)


def _visible(inputs: Inputs, block: Block) -> Bool[Array, "#B #c #K #T #G"] | None:
    """True where a query may attend to a key that the block owns; None if nothing is removed."""
    mask, size = inputs.mask, inputs.sizes
    cut = lambda x, axis: None if x is None else block.cut(x, axis)
    mask = replace(mask, allowed=cut(mask.allowed, 3), key_segments=cut(mask.key_segments, 1))
    may_attend = masks.visible(mask, positions(size.T), block.columns, positions(size.N))
    may_attend = None if may_attend is None else _as_scores(may_attend, size)
    if size.S % block.columns.shape[0] == 0:
        return may_attend
    owned = (block.columns >= block.owned)[None, :, None, None, None]
    return owned if may_attend is None else may_attend & owned


def _cleared(inputs: Inputs, x: Shaped[Array, "B c ..."], block: Block) -> Shaped[Array, "B c ..."]:
    """Values, or their scales, with 0 in the padding: its weight is 0, but it may hold NaN, and 0 * NaN is NaN."""
    lengths = inputs.mask.key_lengths
    if lengths is None:
        return x
    valid = block.columns[None] < lengths[:, None]
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def _drop(inputs: Inputs, weight: BlockScores, block: Block) -> BlockScores:
    spec, size = inputs.dropout, inputs.sizes
    if spec is None:
        return weight
    batch, column = spec.batch[:, None, None, None, None], block.columns[None, :, None, None, None]
    head = positions(size.N).reshape(1, 1, size.K, 1, size.G)
    kept = dropout.keep(spec, batch, head, positions(size.T)[None, None, None, :, None], column)
    return jnp.where(kept, weight * spec.scale, 0.0)


def _as_scores(x: Shaped[Array, "#B #N #T #c"], size: Sizes) -> Shaped[Array, "#B #c #K #T #G"]:
    heads = (1, 1) if x.shape[1] == 1 else (size.K, size.G)
    return x.reshape(x.shape[0], *heads, *x.shape[2:]).transpose(0, 4, 1, 3, 2)


def _of_heads(x: Float[Array, " N"], inputs: Inputs) -> Float[Array, "1 K 1 G"]:
    return x.astype(inputs.score_dtype).reshape(1, inputs.sizes.K, 1, inputs.sizes.G)


def _sinks_of_rows(inputs: Inputs) -> Float[Array, "#B K #T G 1"] | None:
    """The sink of each row; -inf, which means no sink, in queries that are padding."""
    sinks, size = inputs.operands.sinks, inputs.sizes
    if sinks is None:
        return None
    sinks = _of_heads(sinks, inputs)[..., None]
    exist = masks.exist(inputs.mask.query_lengths, positions(size.T))
    return sinks if exist is None else jnp.where(exist[:, None, :, None, None], sinks, -jnp.inf)


def _ungroup(x: Float[Array, "B K T G X"], size: Sizes) -> Float[Array, "B T N X"]:
    return x.swapaxes(1, 2).reshape(size.B, size.T, size.N, -1)


# -- the products -----------------------------------------------------------------------------------------------------


def plain_scores(inputs: Inputs, query: GroupedQuery, key: Key) -> BlockScores:
    """For accelerators."""
    return _product("bktgh,bckh->bcktg", inputs, query, key)


def plain_values(inputs: Inputs, weight: BlockScores, value: Value) -> PartialOutputs:
    return _product("bcktg,bckv->bktgv", inputs, weight.astype(value.dtype), value)[:, None]


def _product(equation: str, inputs: Inputs, left: Array, right: Array) -> Array:
    return jnp.einsum(equation, left, right, precision=inputs.precision, preferred_element_type=inputs.score_dtype)


def summed_scores(inputs: Inputs, query: GroupedQuery, key: Key) -> BlockScores:
    """For CPUs: multiplies and adds elementwise. For a matrix product per head XLA would transpose the keys first.

    The features are summed in 8 lanes of a vector, then the lanes are summed in a separate step.
    """
    lanes = math.gcd(query.shape[-1], 8)
    in_lanes = lambda x: x.astype(inputs.score_dtype).reshape(*x.shape[:-1], -1, lanes)
    terms = in_lanes(query)[:, None] * in_lanes(key)[:, :, :, None, None]
    return _sum_in_place(lax.optimization_barrier(_sum_in_place(terms, 5)), 5)


def summed_values(inputs: Inputs, weight: BlockScores, value: Value) -> PartialOutputs:
    """For CPUs, also elementwise. Each part sums 8 neighbouring keys, so that the values are read in order."""
    batch, columns, *_ = weight.shape
    near = math.gcd(columns, 8)
    in_parts = lambda x: x.reshape(batch, columns // near, near, *x.shape[2:])
    terms = in_parts(weight)[..., None] * in_parts(value.astype(weight.dtype))[:, :, :, :, None, None]
    return _sum_in_place(terms, 2)


def _sum_in_place(terms: Array, axis: int) -> Array:
    """A sum that XLA fuses with its terms, including the slices of the cache.

    XLA:CPU would call the library YNNPACK for a sum, for which it copies these slices: 10 times slower. Rounding the
    sum to its own dtype, which changes no number, prevents XLA from recognising it as a sum.
    """
    dtype = jnp.finfo(terms.dtype)
    rounded = lambda x: lax.reduce_precision(x, dtype.nexp, dtype.nmant)
    return lax.reduce(terms, terms.dtype.type(0), lambda a, b: rounded(a + b), (axis,))
