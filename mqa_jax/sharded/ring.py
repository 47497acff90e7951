"""Attention over a sequence that is cut over devices, inside of `jax.shard_map`, and its derivative.

Each device keeps its queries. Keys and values come to it (`strategies`); the results of all steps are merged by their
normalizers, in float32. The backward pass of FlashAttention needs nothing of the forward pass but the output and the
normalizer of whole rows: with these, each step gives its own share of every gradient, so no step is saved.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from mqa_jax import reference
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import devices, online_softmax, primitives, row_terms
from mqa_jax.kernels.online_softmax import Normalizer, State
from mqa_jax.kernels.platforms import Kernels
from mqa_jax.shapes import LogSumExp, Output
from mqa_jax.sharded.chunks import Chunk, add_pairs, pair, rows
from mqa_jax.sharded.strategies import AllGather, Held, Ring, varying_like


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
    leaves, tree = jax.tree.flatten(inputs)
    *leaves, _ = devices.alike([*leaves, lax.axis_index(strategy.axis)])
    inputs = _with_columns(strategy, jax.tree.unflatten(tree, leaves))
    operands, rest = inputs.operands, replace(inputs, operands=None)  # type: ignore[arg-type]
    out, log_sum_exp = _attend(Plan(kernels, strategy), operands, rest)
    return out, log_sum_exp if inputs.residual else None


def _with_columns(strategy: Ring | AllGather, inputs: Inputs) -> Inputs:
    """Numbers of keys, which are few, and the columns of bias and mask, as every step needs them."""
    operands, mask = inputs.operands, inputs.mask
    gather = lambda x: None if x is None else lax.all_gather(x, strategy.axis, axis=1, tiled=True)
    numbers = mask.key_segments, operands.key_scale, operands.value_scale
    segments, key_scale, value_scale = (strategy.whole(gather(x)) for x in numbers)
    bias, allowed = (strategy.whole(x, axis=3) for x in (operands.bias, mask.allowed))
    operands = replace(operands, bias=bias, key_scale=key_scale, value_scale=value_scale)
    return replace(inputs, operands=operands, mask=replace(mask, allowed=allowed, key_segments=segments))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, operands: Operands, rest: Inputs) -> tuple[Output, LogSumExp]:
    out, normalizer = _forward(plan, replace(rest, operands=operands))
    return out, normalizer.log_sum_exp


def _forward(plan: Plan, inputs: Inputs) -> tuple[Output, Normalizer]:
    queries, size = plan.queries(inputs), inputs.sizes
    key, value = inputs.operands.key, inputs.operands.value
    empty = lambda chunk: State.empty(size.B, chunk.length, size.N, features=size.V, dtype=inputs.score_dtype)

    def step(keys: list[Chunk], held: Held, states: tuple[State, ...]) -> tuple[State, ...]:
        found = list(states)
        for i, j in plan.pairs(inputs, keys):
            part = State.of(*primitives.forward(plan.kernels, pair(inputs, queries[i], keys[j], *held[j])))
            found[i] = online_softmax.merge(found[i], part)
        return tuple(found)

    states = varying_like(tuple(map(empty, queries)), inputs.operands.query)
    states = plan.strategy.forward(key, value, step, states)
    results = [finish(rows(inputs, chunk), state) for chunk, state in zip(queries, states)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *results)


def finish(inputs: Inputs, state: State) -> tuple[Output, Normalizer]:
    """With the sinks, which are scores of no step."""
    sinks = reference.sinks_of_rows(inputs)
    out, normalizer = online_softmax.finish(state, None if sinks is None else sinks.swapaxes(1, 2))
    return out.astype(inputs.dtype), jax.tree.map(lambda x: x[..., 0], normalizer)


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


def _backward(
    plan: Plan, inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp
) -> Operands:
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
    return replace(sums.others, query=d_query, key=d_key, value=d_value, sinks=d_sinks)


# -- the derivative ---------------------------------------------------------------------------------------------------

OPTIONAL = "bias", "alibi_slopes", "sinks", "score_arrays"  # whose gradients cost something of their own


def _attend_forward(plan: Plan, operands: Any, rest: Any) -> tuple[tuple[Output, LogSumExp], tuple]:
    """JAX says for each array whether it is differentiated."""
    if operands.key_scale is not None:
        raise NotImplementedError(primitives.QUANTIZED)
    needed = lambda name: any(x.perturbed for x in jax.tree.leaves(getattr(operands, name)))
    constant = tuple(name for name in OPTIONAL if not needed(name))
    operands, rest = jax.tree.map(lambda x: x.value, (operands, rest))
    inputs = replace(rest, operands=operands, constant=constant)
    out, normalizer = _forward(plan, inputs)
    saved = checkpoint_name(out, primitives.OUT_NAME), primitives.without_infinity(normalizer)
    named = checkpoint_name(saved[1], primitives.LOG_SUM_EXP_NAME)
    return (saved[0], normalizer.log_sum_exp), (inputs, saved[0], named)


def _attend_backward(plan: Plan, saved: tuple, cotangents: tuple) -> tuple[Operands, None]:
    inputs, out, normalizer = saved
    filled = [jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents]
    d_out, d_log_sum_exp, _ = devices.alike([*filled, out])
    inputs, d_out = lax.optimization_barrier((inputs, d_out))  # else XLA keeps what the forward pass gathered
    found = _backward(plan, inputs, out, normalizer, d_out, d_log_sum_exp)
    in_its_dtype = lambda gradient, x: None if gradient is None else gradient.astype(x.dtype)
    return jax.tree.map(in_its_dtype, found, inputs.operands, is_leaf=lambda x: x is None), None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)
