"""Attention over a sequence that is cut over devices, inside of `jax.shard_map`, and its derivatives.

Each device keeps its queries. Keys and values come to it (`strategies`); the results of all steps are merged by their
normalizers, in float32. The other passes of FlashAttention need nothing of the forward pass but the output and the
normalizer of whole rows: with these, each step gives its own share of every tangent and gradient, so no step is saved.

The passes are those of an implementation (`platforms.Kernels`), which `primitives` makes differentiable as it does all.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mqa_jax import reference
from mqa_jax.axes import alike
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import online_softmax, primitives, row_blocks, row_terms
from mqa_jax.kernels.online_softmax import Normalizer, State
from mqa_jax.kernels.platforms import Kernels
from mqa_jax.shapes import LogSumExp, Output
from mqa_jax.sharded.chunks import Chunk, add_pairs, pair, rows
from mqa_jax.sharded.strategies import AllGather, AxisName, Held, Ring, varying_like


class Plan(NamedTuple):
    """All that is static."""

    kernels: Kernels
    strategy: Ring | AllGather

    def queries(self, inputs: Inputs) -> list[Chunk]:
        """The chunks of this device's queries."""
        return self.strategy.order.chunks(lax.axis_index(self.strategy.axis), inputs.sizes.T)

    def pairs(self, inputs: Inputs, keys: list[Chunk]) -> list[tuple[int, int]]:
        """Numbers of chunks of queries and keys, but not a pair that a causal mask hides on all devices."""
        every = [(i, j) for i in range(self.strategy.order.count) for j in range(len(keys))]
        size, mask = inputs.sizes, inputs.mask
        is_plain = mask.is_causal and mask.query_offset is None and size.T == size.S
        return [one for one in every if not (is_plain and one == (0, 1))]


def attend(kernels: Kernels, strategy: Ring | AllGather, inputs: Inputs) -> tuple[Output, LogSumExp | None]:
    """Output and log-sum-exp of this device's queries; `inputs` have its parts of all arrays, and whole lengths."""
    inputs = _ordered(strategy, _with_numbers_of_keys(strategy.axis, _varying(strategy.axis, inputs)))
    out, log_sum_exp = primitives.attend(passes(Plan(kernels, strategy)), inputs)
    return out, log_sum_exp if inputs.residual else None


@functools.cache  # the same object for the same plan, so that jit finds the programs compiled for it
def passes(plan: Plan) -> Kernels:
    """All passes but `textbook` run when they are lowered, where types do not say over which axes arrays vary."""
    lowered = lambda function: lambda *arguments: function(plan, *_varying(plan.strategy.axis, arguments))
    return Kernels(lowered(_forward), lowered(_backward), lowered(_tangent), functools.partial(_textbook, plan))


def _varying(axis: AxisName, tree: Any) -> Any:
    """As the index of the device varies."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, alike([*leaves, lax.axis_index(axis)])[:-1])


def _with_numbers_of_keys(axis: AxisName, inputs: Inputs) -> Inputs:
    """Those of all keys, which are few: segments and scales."""
    operands, mask = inputs.operands, inputs.mask
    numbers = mask.key_segments, operands.key_scale, operands.value_scale
    gather = lambda x: None if x is None else lax.all_gather(x, axis, axis=1, tiled=True)
    segments, key_scale, value_scale = map(gather, numbers)
    operands = replace(operands, key_scale=key_scale, value_scale=value_scale)
    return replace(inputs, operands=operands, mask=replace(mask, key_segments=segments))


def _ordered(strategy: Ring | AllGather, inputs: Inputs) -> Inputs:
    """Arrays with all columns, in the order in which steps need them."""
    operands, mask = inputs.operands, inputs.mask
    numbers = mask.key_segments, operands.key_scale, operands.value_scale
    segments, key_scale, value_scale = (strategy.whole(x) for x in numbers)
    bias, allowed = (strategy.whole(x, axis=3) for x in (operands.bias, mask.allowed))
    operands = replace(operands, bias=bias, key_scale=key_scale, value_scale=value_scale)
    return replace(inputs, operands=operands, mask=replace(mask, allowed=allowed, key_segments=segments))


# -- forward ----------------------------------------------------------------------------------------------------------


def _forward(plan: Plan, inputs: Inputs) -> tuple[Output, Normalizer]:
    queries, size = plan.queries(inputs), inputs.sizes
    empty = lambda chunk: State.empty(size.B, chunk.length, size.N, features=size.V, dtype=inputs.score_dtype)

    def step(keys: list[Chunk], held: Held, states: tuple[State, ...]) -> tuple[State, ...]:
        found = list(states)
        for i, j in plan.pairs(inputs, keys):
            part = State.of(*primitives.forward(plan.kernels, pair(inputs, queries[i], keys[j], *held[j])))
            found[i] = online_softmax.merge(found[i], part)
        return tuple(found)

    states = varying_like(tuple(map(empty, queries)), inputs.operands.query)
    states = plan.strategy.forward((inputs.operands.key, inputs.operands.value), step, states)
    results = [finish(rows(inputs, chunk), state) for chunk, state in zip(queries, states)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results)


def finish(inputs: Inputs, state: State) -> tuple[Output, Normalizer]:
    """With the sinks, which are scores of no step."""
    sinks = reference.sinks_of_rows(inputs)
    out, normalizer = online_softmax.finish(state, None if sinks is None else sinks.swapaxes(1, 2))
    return out.astype(inputs.dtype), jax.tree.map(lambda x: x[..., 0], normalizer)


# -- forward mode -----------------------------------------------------------------------------------------------------


def _tangent(
    plan: Plan, inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands
) -> tuple[Output, LogSumExp]:
    """With normalizers of whole rows both tangents are sums over keys; those of keys and values travel with them."""
    queries, operands, size = plan.queries(inputs), inputs.operands, inputs.sizes
    of_rows = out.astype(inputs.score_dtype), normalizer
    moved = replace(inputs, operands=tangents)

    def step(keys: list[Chunk], held: Any, sums: tuple) -> tuple:
        found = list(sums)
        for i, j in plan.pairs(inputs, keys):
            (key, value), of_keys = held[j]
            problem = pair(inputs, queries[i], keys[j], key, value)
            changes = pair(moved, queries[i], keys[j], *of_keys).operands
            own_out, own_normalizer = jax.tree.map(queries[i].of, of_rows)
            part = primitives.tangent(plan.kernels, problem, own_out, own_normalizer, changes)
            found[i] = jax.tree.map(jnp.add, found[i], part)
        return tuple(found)

    zeros = lambda length: tuple(jnp.zeros((size.B, length, size.N, *x), inputs.score_dtype) for x in ((size.V,), ()))
    sums = varying_like(tuple(zeros(chunk.length) for chunk in queries), operands.query)
    if jax.tree.leaves(replace(tangents, sinks=None)):
        sums = plan.strategy.forward(((operands.key, operands.value), (tangents.key, tangents.value)), step, sums)
    d_out, d_log_sum_exp = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *sums)
    by_sinks = row_terms.moved_by_sinks(operands.sinks, tangents.sinks, normalizer)
    d_out = d_out - by_sinks[..., None] * of_rows[0]
    return d_out.astype(inputs.dtype), d_log_sum_exp + by_sinks


# -- reverse mode -----------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """Gradients that stay on the device, in `score_dtype`; None where none is needed."""

    queries: tuple[Array, ...]  # of each chunk: joined in every step they would be copied
    others: Any  # Operands with those that are not of single queries

    @classmethod
    def zeros(cls, queries: list[Chunk], inputs: Inputs) -> "_Sums":
        size = inputs.sizes
        zeros = lambda *shape: jnp.zeros(shape, inputs.score_dtype)
        operands: Any = inputs.operands
        others = replace(operands, **dict.fromkeys(("query", "key", "value", "sinks", *inputs.constant)))
        sums = cls(
            tuple(zeros(size.B, chunk.length, size.N, size.H) for chunk in queries),
            jax.tree.map(lambda x: zeros(*x.shape), others),
        )
        return varying_like(sums, inputs.operands.query)

    def add(self, part: Any, i: int, queries: Chunk, keys: Chunk) -> "_Sums":
        """The gradients of chunk i of the queries and a chunk of keys."""
        by_number = [x + part.query if number == i else x for number, x in enumerate(self.queries)]
        added = replace(part, query=None, key=None, value=None, bias=None)
        others = jax.tree.map(jnp.add, replace(self.others, bias=None), added)
        if part.bias is not None:
            others = replace(others, bias=add_pairs(self.others.bias, part.bias, queries, keys))
        return _Sums(tuple(by_number), others)


OPTIONAL = "bias", "alibi_slopes", "sinks", "score_arrays"  # whose gradients cost something of their own


def _backward(
    plan: Plan, inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp
) -> Operands:
    inputs, d_out = lax.optimization_barrier((inputs, d_out))  # else XLA keeps what the forward pass gathered
    inputs = replace(inputs, constant=tuple(name for name in inputs.constant if name in OPTIONAL))
    queries, operands, of_rows = plan.queries(inputs), inputs.operands, (out, normalizer, d_out, d_log_sum_exp)

    def step(keys: list[Chunk], held: Held, sums: _Sums) -> tuple[_Sums, Held]:
        d_held: list[Any] = [None] * len(keys)
        for i, j in plan.pairs(inputs, keys):
            problem = pair(inputs, queries[i], keys[j], *held[j])
            part = primitives.backward(plan.kernels, problem, *jax.tree.map(queries[i].of, of_rows))
            sums = sums.add(part, i, queries[i], keys[j])
            found = part.key, part.value
            d_held[j] = found if d_held[j] is None else jax.tree.map(jnp.add, d_held[j], found)
        return sums, d_held

    sums = _Sums.zeros(queries, inputs)
    sums, d_key, d_value = plan.strategy.backward(operands.key, operands.value, step, sums)
    d_sinks = None
    if inputs.needs_gradient("sinks"):
        d_sinks = row_terms.d_sinks(operands.sinks, normalizer, row_terms.delta(out, d_out, d_log_sum_exp))
    d_query = jnp.concatenate(sums.queries, axis=1)
    found = replace(sums.others, query=d_query, key=d_key, value=d_value, sinks=d_sinks)
    in_its_dtype = lambda gradient, x: None if gradient is None else gradient.astype(x.dtype)
    return jax.tree.map(in_its_dtype, found, inputs.operands, is_leaf=lambda x: x is None)


# -- second derivatives -----------------------------------------------------------------------------------------------


def _textbook(plan: Plan, inputs: Inputs) -> tuple[Output, LogSumExp]:
    """With the keys of all devices at once."""
    strategy, operands = plan.strategy, inputs.operands
    gather = AllGather(strategy.axis, strategy.order)
    if isinstance(strategy, Ring):
        inputs = _ordered(gather, inputs)

    def step(keys: list[Chunk], held: Held, _: None) -> Any:
        problems = [pair(inputs, queries, keys[0], *held[0], is_part=False) for queries in plan.queries(inputs)]
        with_sinks = [replace(x, operands=replace(x.operands, sinks=operands.sinks)) for x in problems]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *map(row_blocks.attend, with_sinks))

    return gather.forward((operands.key, operands.value), step, None)
