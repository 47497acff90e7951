"""Errors for what fused kernels do not support, derivatives and platforms, each with its remedy.

JAX raises errors too, but in terms of `custom_vjp`, `while_loop` and `pallas_call`, which users did not write.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

_REMEDY = (
    "Call with implementation='reference' (modules: attn_impl='reference'), which JAX differentiates to any order."
)

QUANTIZED = (
    "Fused attention to keys and values in 8 bits has no derivative. Differentiate with respect to the numbers before "
    "they were quantized, or call with implementation='reference'."
)


def reverse_mode_only(x: Array) -> Array:
    """The identity; raises where its tangent is evaluated (forward mode), not where it is transposed (reverse mode)."""
    return _reverse_mode_only(x)


@jax.custom_jvp
def first_derivative_only(tree):
    """The identity on any pytree; raises as soon as it is differentiated."""
    return tree


@first_derivative_only.defjvp
def _first_derivative_only_jvp(primals, tangents):
    raise NotImplementedError(f"Fused attention has no second derivative. {_REMEDY}")


@jax.custom_jvp
def _reverse_mode_only(x: Array) -> Array:
    return x


@_reverse_mode_only.defjvp
def _reverse_mode_only_jvp(primals, tangents):
    message = f"Fused attention has no forward-mode derivative (jvp, jacfwd, linearize). {_REMEDY}"
    return primals[0], where_lowered(tangents[0], message)


def where_lowered(x: Array, message: str) -> Array:
    """A linear identity: it can be staged, batched and transposed (which removes it); running or lowering it raises."""
    return _refused_p.bind(x, message=message)


def _refuse(*_, message: str, **__):
    raise NotImplementedError(message)


_refused_p = Primitive("refused")
_refused_p.def_impl(_refuse)
_refused_p.def_abstract_eval(lambda aval, **_: aval)
mlir.register_lowering(_refused_p, _refuse)
ad.deflinear(_refused_p, lambda cotangent, **_: [cotangent])
batching.defvectorized(_refused_p)
