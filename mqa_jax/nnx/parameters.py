"""Parameters between linen and NNX: they have the same names and shapes, so only their containers differ."""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mqa_jax.layer.settings import AttentionSettings
from mqa_jax.nnx import attention

Params = dict[str, Any]


def to_linen(model: nnx.Module) -> Params:
    """The `params` collection of linen, nested dicts of arrays. Members of a list `layer` are `layer_0`, `layer_1`."""
    return _named(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def to_nnx(model: nnx.Module, params: Params) -> None:
    """Puts a `params` collection of linen, such as `from_torch` and checkpoints give, into an NNX model, in place."""
    nnx.update(model, _state(model, params))


def with_params(model: Any, params: Params) -> Any:
    """A model with these parameters of linen. What else it holds it shares with `model`, which may be abstract.

    Example:
      >>> from flax import nnx
      >>> from mqa_jax import nnx as mqa_nnx
      >>> make = lambda: mqa_nnx.GroupedQueryAttention(64, 8, rngs=nnx.Rngs(0))
      >>> params = mqa_nnx.to_linen(make())
      >>> model = mqa_nnx.with_params(nnx.eval_shape(make), params)  # no initialisation, only shapes
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]
    return nnx.merge(graphdef, _state(model, params), rest)


def _state(model: nnx.Module, params: Params) -> nnx.State:
    """That of the model, with the arrays of `params` in the dtypes that it has."""
    variables = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))
    found = dict(_paths(params))
    shapes = {_joined(path): variable.get_value().shape for path, variable in variables.items()}
    different = sorted({(name, x.shape) for name, x in found.items()} ^ set(shapes.items()))
    if different:
        raise ValueError(
            f"These are no parameters of {type(model).__name__}: {different[:4]} are in one of both only; the model "
            f"has {len(shapes)}, params {len(found)}."
        )
    cast = lambda path, old: old.replace(jnp.asarray(found[_joined(path)], old.get_value().dtype))
    return nnx.from_flat_state([(path, cast(path, variable)) for path, variable in variables.items()])


def from_linen(module: AttentionSettings, params: Params) -> attention.GroupedQueryAttention:
    """The NNX module with settings and parameters of one of linen, such as `torch_interop.from_torch` returns."""
    kind = getattr(attention, type(module).__name__, attention.GroupedQueryAttention)
    names = [field.name for field in dataclasses.fields(AttentionSettings)]
    widths = {name: params[name]["kernel"].shape[0] for name in ("key", "value") if name in params}
    made = kind(
        **{name: getattr(module, name) for name in names},
        key_value_projections="key" in params,
        in_kv_features=widths.get("key"),
        in_v_features=widths.get("value"),
        rngs=nnx.Rngs(0),
    )
    to_nnx(made, params)
    return made


def _named(tree: Params) -> Params:
    named: Params = {}
    for name, x in tree.items():
        if isinstance(x, dict) and x and all(isinstance(key, int) for key in x):
            named |= {f"{name}_{key}": _named(part) for key, part in x.items()}
        else:
            named[name] = _named(x) if isinstance(x, dict) else x
    return named


def _joined(path: tuple) -> str:
    return re.sub(r"/(\d+)(?=/|$)", r"_\1", "/".join(map(str, path)))


def _paths(params: Params, prefix: str = "") -> Any:
    for name, x in params.items():
        if hasattr(x, "items"):
            yield from _paths(x, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", x
