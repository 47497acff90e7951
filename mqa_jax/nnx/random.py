"""Random keys of `flax.nnx` modules: for parameters, when they are made; for dropout, a stream that they keep."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


def checked_rngs(module: Any, rngs: Any) -> nnx.Rngs:
    """What parameters are drawn from."""
    if not isinstance(rngs, nnx.Rngs):
        raise ValueError(
            f"{type(module).__name__} draws its parameters when it is made, from nnx.Rngs: rngs={rngs!r}. "
            "Pass rngs=nnx.Rngs(0), or with another seed."
        )
    return rngs


def new_stream(rngs: nnx.Rngs | None) -> nnx.RngStream | None:
    """The stream of dropout that a module keeps; none where there are keys for parameters alone."""
    return rngs.dropout.fork() if rngs is not None and ("dropout" in rngs or "default" in rngs) else None


def stream_of(rngs: Any) -> Callable[[], Array]:
    """What gives the keys of dropout: a stream, the one called so of `nnx.Rngs`, or one key."""
    if isinstance(rngs, nnx.Rngs):
        return rngs.dropout
    if isinstance(rngs, nnx.RngStream):
        return rngs
    if isinstance(rngs, jax.Array) and (jnp.issubdtype(rngs.dtype, jax.dtypes.prng_key) or rngs.shape == (2,)):
        return lambda: rngs
    raise ValueError(f"rngs must be nnx.Rngs, a stream of it, or a key of jax.random: rngs={rngs!r}.")


def dropout_key(module: Any, deterministic: bool | None) -> Array | None:
    """None without dropout. As in Flax's own modules the call comes before the module."""
    deterministic = module.deterministic if deterministic is None else deterministic
    if deterministic is None:
        raise ValueError(
            'Parameter "deterministic" must be passed to the constructor or at call time, or to '
            "nnx.view(model, deterministic=...)."
        )
    if deterministic:
        return None
    if module.rngs is None:
        raise ValueError(
            "Dropout needs random keys, and this module keeps no stream of them: keep_rngs=False, or made without "
            "rngs. Pass rngs=nnx.Rngs(dropout=seed) to the call."
        )
    return module.rngs()


def takes_rngs(call: Callable) -> Callable:
    """A call of the layer as that of NNX: `rngs=` replaces the stored stream of random keys."""

    def __call__(self: Any, *arguments: Any, rngs: Any = None, **options: Any) -> Any:
        layer = self
        if rngs is not None:
            layer = copy.copy(self)  # which shares the variables
            object.__setattr__(layer, "rngs", stream_of(rngs))
        return call(layer, *arguments, **options)

    made: Any = __call__
    signature, last = inspect.signature(call), "\n\n        Returns:\n"
    rngs = inspect.Parameter("rngs", inspect.Parameter.KEYWORD_ONLY, default=None)
    made.__signature__ = signature.replace(parameters=[*signature.parameters.values(), rngs])
    rngs_doc = (
        "\n          rngs: `nnx.Rngs`, a stream or a key, for the dropout of this call, instead of the stored stream."
    )
    __call__.__doc__ = (call.__doc__ or "").replace(last, rngs_doc + last)
    return __call__
