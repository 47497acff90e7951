"""How JAX lowers the Triton kernels: without a deprecation warning, and with an error where offsets would be wrong.

Both belong to lowering: JAX warns then, and only then the sizes of the arrays with the axes of `vmap` are known.
"""

import functools
import types
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array

# -- arrays out of reach ----------------------------------------------------------------------------------------------

# Offsets count entries and have 32 bits unless the array has more than 2^32 bytes. In an array of 2^32 single bytes the
# last offset is 2^32 - 1, which is -1 as a signed number.
WRONG_OFFSETS = 2 << 30, 4 << 30


def is_out_of_reach(x: Any) -> bool:
    return x.dtype.itemsize == 1 and WRONG_OFFSETS[0] <= x.size <= WRONG_OFFSETS[1]


def in_reach(kernel: str, arguments: Any) -> Any:
    """The arguments of a kernel; raises NotImplementedError at lowering if one of them has wrong offsets."""

    def checked(path: tuple, x: Array) -> Array:
        name = getattr(path[-1], "name", "an argument")
        return _in_reach_p.bind(x, name=f"{name} of {kernel}") if x.dtype.itemsize == 1 else x

    return jax.tree_util.tree_map_with_path(checked, arguments)


def _check(x: Any, name: str) -> None:
    if is_out_of_reach(x):
        raise NotImplementedError(
            f"Triton kernels can read arrays of bytes of less than 2 or more than 4 GiB only: {name} has "
            f"shape={tuple(x.shape)}, dtype={x.dtype}, with the axes that vmap has added. Use implementation='xla' "
            "(modules: attn_impl='xla'), or map over smaller parts with jax.lax.map(..., batch_size=...)."
        )


def _in_reach_impl(x: Array, *, name: str) -> Array:
    _check(x, name)
    return x


def _in_reach_lowering(context: Any, x: Any, *, name: str) -> list[Any]:
    _check(context.avals_in[0], name)
    return [x]


_in_reach_p = Primitive("mqa_in_reach")  # the identity
_in_reach_p.def_impl(_in_reach_impl)
_in_reach_p.def_abstract_eval(lambda aval, **_: aval)
mlir.register_lowering(_in_reach_p, _in_reach_lowering)
batching.defvectorized(_in_reach_p)

# -- the warning ------------------------------------------------------------------------------------------------------


@functools.cache
def quiet_parameters() -> Any:
    """The class of a kernel's compiler parameters: that of Pallas-Triton, with a lowering rule that does not warn.

    From 0.11 on JAX's rule starts with a DeprecationWarning, each time a kernel is lowered. Callers of this library
    cannot avoid it, and under `-W error` it would be an exception. Warning filters belong to the whole process, not to
    a thread, so they are not changed. JAX selects a rule by the type of the parameters: the rule registered here is
    JAX's function with a copy of its globals, in which `deprecations` does not warn. JAX's own module and the warnings
    of other kernels do not change. All of this is private to JAX. Where it is not found, JAX warns.
    """
    from jax.experimental.pallas import triton

    try:
        from jax._src.pallas.core import register_lowering_rule
        from jax._src.pallas.triton import pallas_call_registration as backend

        rule, loud = backend.pallas_call_lowering, vars(backend)["deprecations"]
        silent = types.SimpleNamespace(**{**vars(loud), "warn": lambda *_, **__: None})
        names = {**vars(backend), "deprecations": silent}
        quiet = types.FunctionType(rule.__code__, names, rule.__name__, rule.__defaults__, rule.__closure__)
        quiet.__kwdefaults__ = rule.__kwdefaults__
    except (ImportError, AttributeError, KeyError):  # 0.10 does not warn, and has none of it
        return triton.CompilerParams

    class QuietCompilerParams(triton.CompilerParams):
        pass

    register_lowering_rule(QuietCompilerParams, quiet, "gpu")
    return QuietCompilerParams
