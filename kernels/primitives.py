"""Attention as three primitives of JAX, from which every derivative, of either mode, and `jax.vmap` follow.

    attention_p    output, log-sum-exp and normalizer; its derivative is
    tangent_p      the tangents of output and log-sum-exp, linear in those of the operands; its transpose is
    backward_p     the gradients of the operands, linear in those of output and log-sum-exp; its transpose is tangent_p

All three compute with the passes of a fused implementation (`platforms.Kernels`). `jax.custom_vjp` has no forward mode,
and `jax.custom_jvp` no way to say how a tangent is transposed. The derivatives of tangent_p and backward_p with respect
to the operands, that is second derivatives, are those of textbook attention (`Kernels.textbook`, `row_blocks`).

The arguments are the leaves of `Inputs`, of which the operands come first; after them, for the last two primitives,
output and normalizer, which are functions of the inputs: their own tangents are not used. `wanted` has the indices of
the leaves with tangents or gradients.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from mqa_jax import axes, batch_axes
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import devices, mapped, row_blocks
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.platforms import Kernels
from mqa_jax.shapes import LogSumExp, Output

# Names of the residuals for the policies of `jax.checkpoint` (save_only_these_names).
OUT_NAME, LOG_SUM_EXP_NAME = "mqa_jax_out", "mqa_jax_log_sum_exp"
SAVED = 3  # output and the two numbers of the normalizer
Tree = Any  # a tree structure of `Inputs`, with its static fields
Wanted = tuple[int, ...]

QUANTIZED = (
    "Fused attention to keys and values in 8 bits has no derivative. Differentiate with respect to the numbers before "
    "they were quantized, or call with implementation='reference'."
)


def attend(kernels: Kernels, inputs: Inputs) -> tuple[Output, LogSumExp]:
    """Output and log-sum-exp."""
    out, log_sum_exp, *_ = _bind_forward(kernels, inputs)
    return out, log_sum_exp


def forward(kernels: Kernels, inputs: Inputs) -> tuple[Output, Normalizer]:
    """The forward pass alone, for a caller with a derivative of its own."""
    out, _, *normalizer = _bind_forward(kernels, inputs)
    return out, Normalizer(*normalizer)


def backward(
    kernels: Kernels, inputs: Inputs, out: Output, normalizer: Normalizer, d_out: Output, d_log_sum_exp: LogSumExp
) -> Operands:
    """The gradients of all operands but `inputs.constant`, which are None."""
    leaves, tree = jax.tree.flatten(inputs)
    numbers: Any = _operands(inputs, dict(enumerate(range(len(leaves)))))
    constant: Any = dict.fromkeys(inputs.constant)
    wanted = tuple(jax.tree.leaves(replace(numbers, **constant)))
    arguments = axes.alike([*leaves, out, *normalizer, d_out, d_log_sum_exp])
    found = backward_p.bind(*arguments, kernels=kernels, tree=tree, wanted=wanted, maps=())
    return replace(_operands(inputs, dict(zip(wanted, found))), **constant)


def tangent(
    kernels: Kernels, inputs: Inputs, out: Output, normalizer: Normalizer, tangents: Operands
) -> tuple[Output, LogSumExp]:
    """The tangents of output, in its dtype, and log-sum-exp. At least one operand has one, the others have None."""
    leaves, tree = jax.tree.flatten(inputs)
    structure: Any = jax.tree.structure(inputs.operands)
    moved = {i: x for i, x in enumerate(structure.flatten_up_to(tangents)) if x is not None}
    arguments = axes.alike([*leaves, out, *normalizer, *moved.values()])
    saved, changes = arguments[: -len(moved)], arguments[-len(moved) :]
    d_out, d_log_sum_exp = _tangent_bind(saved, tuple(moved), changes, kernels, tree)
    return d_out, d_log_sum_exp


def _bind_forward(kernels: Kernels, inputs: Inputs) -> list[Array]:
    axes.check_types(inputs.operands.query, inputs.operands.key, inputs.operands.value)
    leaves, tree = jax.tree.flatten(inputs)
    return attention_p.bind(*axes.alike(leaves), kernels=kernels, tree=tree, maps=())


# -- what they compute ------------------------------------------------------------------------------------------------


def _forward(*leaves: Array, kernels: Kernels, tree: Tree) -> list[Array]:
    out, normalizer = kernels.forward(jax.tree.unflatten(tree, leaves))
    return [out, normalizer.log_sum_exp, *normalizer]


def _tangent(*arguments: Array, kernels: Kernels, tree: Tree, wanted: Wanted) -> list[Array]:
    inputs, out, normalizer, tangents = _split(arguments, tree)
    return list(kernels.tangent(inputs, out, normalizer, _operands(inputs, dict(zip(wanted, tangents)))))


def _backward(*arguments: Array, kernels: Kernels, tree: Tree, wanted: Wanted) -> list[Array]:
    inputs, out, normalizer, cotangents = _split(arguments, tree)
    numbers = _operands(inputs, {number: number for number in range(tree.num_leaves)})
    leaves_of = {field.name: jax.tree.leaves(getattr(numbers, field.name)) for field in fields(Operands)}
    constant = tuple(name for name, leaves in leaves_of.items() if not set(leaves) & set(wanted))
    gradients = kernels.backward(replace(inputs, constant=constant), out, normalizer, *cotangents)
    found: dict[int, Array] = {}
    for name, leaves in leaves_of.items():
        if name not in constant:
            found |= zip(leaves, jax.tree.leaves(getattr(gradients, name)), strict=True)
    return [found[number] for number in wanted]


def _split(arguments: Sequence[Any], tree: Tree) -> tuple[Inputs, Any, Normalizer, Sequence[Any]]:
    leaves, rest = arguments[: tree.num_leaves], arguments[tree.num_leaves :]
    return jax.tree.unflatten(tree, leaves), rest[0], Normalizer(*rest[1:SAVED]), rest[SAVED:]


def _operands(inputs: Inputs, leaves: dict[int, Any]) -> Operands:
    """The operands with these leaves, None for all others."""
    structure: Any = jax.tree.structure(inputs.operands)
    return jax.tree.unflatten(structure, [leaves.get(i) for i in range(structure.num_leaves)])


def _types_of_forward(*leaves: Any, kernels: Kernels, tree: Tree) -> list:
    inputs, query = jax.tree.unflatten(tree, leaves), leaves[0]
    out = devices.like(query, (*query.shape[:-1], inputs.sizes.V), inputs.out_dtype)
    number = devices.like(query, query.shape[:-1], inputs.score_dtype)
    return [out, number, number, number]


def _types_of_tangent(*arguments: Any, kernels: Kernels, tree: Tree, wanted: Wanted) -> list:
    return list(arguments[tree.num_leaves : tree.num_leaves + 2])  # those of output and of a number for each row


def _types_of_backward(*arguments: Any, kernels: Kernels, tree: Tree, wanted: Wanted) -> list:
    inputs = jax.tree.unflatten(tree, arguments[: tree.num_leaves])
    result = lambda x: x.update(dtype=np.dtype(inputs.dtype_of_gradient(x)), weak_type=False)
    return [result(arguments[number]) for number in wanted]


def _letters_of_forward(kernels: Kernels, tree: Tree) -> devices.Letters:
    return devices.Letters(axes.of_leaves(_skeleton(tree)), [axes.OUT, *[axes.NUMBER] * SAVED])


def _letters_of_tangent(kernels: Kernels, tree: Tree, wanted: Wanted) -> devices.Letters:
    leaves = axes.of_leaves(_skeleton(tree))
    saved = [axes.OUT, axes.NUMBER, axes.NUMBER]
    return devices.Letters([*leaves, *saved, *(leaves[i] for i in wanted)], [axes.OUT, axes.NUMBER])


def _letters_of_backward(kernels: Kernels, tree: Tree, wanted: Wanted) -> devices.Letters:
    leaves = axes.of_leaves(_skeleton(tree))
    saved = [axes.OUT, axes.NUMBER, axes.NUMBER]
    return devices.Letters([*leaves, *saved, axes.OUT, axes.NUMBER], [leaves[i] for i in wanted], are_gradients=True)


def _skeleton(tree: Tree) -> Inputs:
    """Inputs with numbers for arrays."""
    return jax.tree.unflatten(tree, range(tree.num_leaves))


attention_p = mapped.define("mqa_attention", _types_of_forward, devices.lowering(_forward, _letters_of_forward))
tangent_p = mapped.define("mqa_attention_tangent", _types_of_tangent, devices.lowering(_tangent, _letters_of_tangent))
backward_p = mapped.define(
    "mqa_attention_backward", _types_of_backward, devices.lowering(_backward, _letters_of_backward)
)


# -- derivatives ------------------------------------------------------------------------------------------------------


def _attention_jvp(leaves: Sequence[Array], tangents: Sequence[Any], *, kernels: Kernels, tree: Tree) -> tuple:
    if jax.tree.unflatten(tree, leaves).operands.key_scale is not None:
        raise NotImplementedError(QUANTIZED)
    out, log_sum_exp, *normalizer = attention_p.bind(*leaves, kernels=kernels, tree=tree, maps=())
    out, wanted = checkpoint_name(out, OUT_NAME), _given(tangents)
    saved = checkpoint_name(without_infinity(Normalizer(*normalizer)), LOG_SUM_EXP_NAME)
    moved = _tangent_bind((*leaves, out, *saved), wanted, [tangents[i] for i in wanted], kernels, tree)
    return [out, log_sum_exp, *normalizer], [*moved, None, None]


def without_infinity(normalizer: Normalizer) -> Normalizer:
    """The largest number instead of -inf: exp(score - highest) is 0 as well, and `jax_debug_infs` finds nothing."""
    highest = normalizer.highest
    return normalizer._replace(highest=jnp.where(highest == -jnp.inf, jnp.finfo(highest.dtype).max, highest))


def _tangent_jvp(
    arguments: Sequence[Array], changes: Sequence[Any], *, kernels: Kernels, tree: Tree, wanted: Wanted
) -> tuple:
    """The tangents change linearly; with the operands, tiles are differentiated again."""
    parameters = dict(kernels=kernels, tree=tree)
    saved, tangents = arguments[: -len(wanted)], arguments[-len(wanted) :]
    terms, again = [], _given(changes[-len(wanted) :])
    if again:
        inner = tuple(wanted[i] for i in again)
        terms.append(_tangent_bind(saved, inner, [changes[len(saved) + i] for i in again], **parameters))
    if moved := _given(changes[: tree.num_leaves]):
        textbook, given = _textbook(kernels, tree), dict(zip(wanted, tangents))
        first = lambda leaves: row_blocks.derivative(textbook, leaves, given)
        terms.append(row_blocks.derivative(first, arguments[: tree.num_leaves], {i: changes[i] for i in moved}))
    results = tangent_p.bind(*arguments, **parameters, wanted=wanted, maps=())
    return results, _sum(terms)


def _tangent_transpose(
    cotangents: list, arguments: list, *, kernels: Kernels, tree: Tree, wanted: Wanted
) -> list[Array]:
    saved, tangents = arguments[: -len(wanted)], arguments[-len(wanted) :]
    linear = tuple(number for number, x in zip(wanted, tangents) if x is None)
    return backward_p.bind(*saved, *cotangents, kernels=kernels, tree=tree, wanted=linear, maps=())


def _backward_jvp(
    arguments: Sequence[Array], changes: Sequence[Any], *, kernels: Kernels, tree: Tree, wanted: Wanted
) -> tuple:
    parameters: dict[str, Any] = dict(kernels=kernels, tree=tree, wanted=wanted)
    saved, cotangents = arguments[:-2], arguments[-2:]
    terms = []
    if _given(changes[-2:]):
        filled = [jnp.zeros_like(x) if dx is None else dx for x, dx in zip(cotangents, changes[-2:])]
        terms.append(backward_p.bind(*saved, *filled, **parameters, maps=()))
    if moved := _given(changes[: tree.num_leaves]):
        textbook = _textbook(kernels, tree)
        first = lambda leaves: row_blocks.gradients(textbook, leaves, cotangents, wanted)
        terms.append(row_blocks.derivative(first, arguments[: tree.num_leaves], {i: changes[i] for i in moved}))
    return backward_p.bind(*arguments, **parameters, maps=()), _sum(terms)


def _backward_transpose(cotangents: list, arguments: list, *, kernels: Kernels, tree: Tree, wanted: Wanted) -> list:
    found = _tangent_bind(arguments[:-2], wanted, cotangents, kernels, tree)
    return [x for x, argument in zip(found, arguments[-2:]) if argument is None]


def _tangent_bind(saved: Sequence[Any], wanted: Wanted, tangents: list, kernels: Kernels, tree: Tree) -> list[Array]:
    return tangent_p.bind(*saved, *tangents, kernels=kernels, tree=tree, wanted=wanted, maps=())


def _textbook(kernels: Kernels, tree: Tree) -> row_blocks.OfLeaves:
    return lambda leaves: kernels.textbook(jax.tree.unflatten(tree, leaves))


def _given(tangents: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(tangents) if x is not None)


def _sum(terms: list[list]) -> list:
    """The sums of results, of which each term has one."""
    return [sum(parts[1:], start=parts[0]) for parts in zip(*terms)]


for primitive in (attention_p, tangent_p, backward_p):
    devices.needs_devices(primitive)
mapped.def_jvp(attention_p, _attention_jvp)
mapped.def_jvp(tangent_p, _tangent_jvp)
mapped.def_jvp(backward_p, _backward_jvp)
mapped.def_transpose(tangent_p, _tangent_transpose)
mapped.def_transpose(backward_p, _backward_transpose)


# -- vmap -------------------------------------------------------------------------------------------------------------


def _flat(primitive: Any) -> Any:
    """Computes the mapped axis as more batch rows, where all arrays that are not small have both axes."""

    def results(arguments: Sequence[Any], axes: mapped.Axes, tree: Tree, wanted: Wanted = (), **parameters: Any) -> Any:
        count = tree.num_leaves
        rest = arguments[count:]
        if any(axis is None for axis in axes[count:]) or any(axes[number] is None for number in wanted):
            return None
        leaves = batch_axes.as_rows(jax.tree.unflatten(tree, arguments[:count]), axes[:count])
        if leaves is None:
            return None
        rows = arguments[0].shape[:2]
        flat = [x.reshape(rows[0] * x.shape[1], *x.shape[2:]) for x in rest]
        given = dict(wanted=wanted) if wanted else {}
        found = primitive.bind(*leaves, *flat, tree=tree, **given, **parameters, maps=())
        return [x.reshape(rows[0], x.shape[0] // rows[0], *x.shape[1:]) for x in found]

    return results


for primitive in (attention_p, tangent_p, backward_p):
    mapped.def_batching(primitive, _flat(primitive))
