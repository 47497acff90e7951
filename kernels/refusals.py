"""Derivatives that a fused kernel does not have, refused with a message that says what to do instead.

JAX refuses them as well, but in terms of `custom_vjp` and `while_loop`, which a user of attention never wrote.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

_REMEDY = (
    "Call with implementation='reference' (modules: attn_impl='reference'), which JAX differentiates to any order."
)


def reverse_mode_only(x: Array) -> Array:
    """The identity; raises where its tangent is evaluated, not where it is transposed, as reverse mode does."""
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
    return primals[0], _tangent_p.bind(tangents[0])


def _refuse(*_, **__):
    raise NotImplementedError(f"Fused attention has no forward-mode derivative (jvp, jacfwd, linearize). {_REMEDY}")


# A linear identity: it can be staged, batched and transposed (where it disappears), but neither run nor lowered.
_tangent_p = Primitive("fused_attention_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(_tangent_p, _refuse)
ad.deflinear(_tangent_p, lambda cotangent: [cotangent])
batching.defvectorized(_tangent_p)
