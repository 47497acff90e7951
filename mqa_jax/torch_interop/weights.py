"""Parameters of Flax modules from the tensors of a PyTorch layer, and back, by its layout (`layouts`).

Nothing is computed, so a conversion there and back is bitwise; except that two output projections become their product.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mqa_jax.torch_interop import layouts
from mqa_jax.torch_interop.layouts import Layout, Params, Rows

# -- from a state dict ------------------------------------------------------------------------------------------------


def read(name: str, layout: Layout, tensors: Mapping[str, Any], heads: int, kv_heads: int) -> Params:
    """The parameters of a Flax module."""
    tensors = {name: x for name, x in tensors.items() if not layouts.is_ignored(name, x)}
    _check_dtypes(tensors)
    tensors = layouts.upright(layout, tensors)
    head_dim = _check(name, layout, tensors, heads, kv_heads)
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    params: Params = {}
    for kind, parts in _by_head(layout.weights, tensors, head_dim).items():
        rows = concatenate([parts[head] for head in range(counts[kind])])
        params[kind] = {"kernel": rows.T.reshape(rows.shape[1], counts[kind], head_dim)}
    if all(bias in tensors for bias in layout.biases):
        for kind, parts in _by_head(layout.biases, tensors, head_dim).items():
            if kind in params:
                params[kind]["bias"] = concatenate([parts[head] for head in range(counts[kind])]).reshape(-1, head_dim)
    if layout.out is not None:
        weight = _output_weight(layout, tensors)
        params["out"] = {"kernel": weight.T.reshape(heads, head_dim, -1)}
        if f"{layout.out}.bias" in tensors:
            params["out"]["bias"] = tensors[f"{layout.out}.bias"]
    for tensor, (path, split) in layout.others.items():
        if tensor in tensors:
            _put(params, path, tensors[tensor] if split is None else tensors[tensor].reshape(split, -1))
    return params


def _by_head(rows: Rows, tensors: Mapping[str, Any], head_dim: int) -> dict[str, dict[int, Any]]:
    parts: dict[str, dict[int, Any]] = {}
    for name, blocks in rows.items():
        for place, (kind, head) in enumerate(blocks):
            parts.setdefault(kind, {})[head] = tensors[name][place * head_dim : (place + 1) * head_dim]
    return parts


def _output_weight(layout: Layout, tensors: Mapping[str, Any]) -> Any:
    """The weight of the output projection; of two successive ones, their product."""
    outer, names = tensors[f"{layout.out}.weight"], layout.folded_names
    if not names:
        return outer
    parts = split_columns(outer, len(names))
    return concatenate([part @ tensors[name] for part, name in zip(parts, names)], axis=1)


# -- to a state dict --------------------------------------------------------------------------------------------------


def write(layout: Layout, params: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict from which `read` makes these parameters."""
    required = {kind for blocks in layout.weights.values() for kind, _ in blocks} | ({"out"} if layout.out else set())
    optional = {path[0] for path, _ in layout.others.values()}
    if not required <= set(params) <= required | optional:
        raise ValueError(
            f"These parameters do not fit the layout: found {sorted(params)}, expected {sorted(required)} and "
            f"optionally {sorted(optional)}."
        )
    tensors = {}
    for rows, part in ((layout.weights, "kernel"), (layout.biases, "bias")):
        kinds = {kind for blocks in rows.values() for kind, _ in blocks}
        if all(part in params[kind] for kind in kinds):
            for name, blocks in rows.items():
                tensors[name] = concatenate([_head(params[kind][part], head) for kind, head in blocks])
    if layout.out is not None:
        kernel = params["out"]["kernel"]
        tensors |= _output(layout, kernel.reshape(-1, kernel.shape[-1]).T)
        if "bias" in params["out"]:
            tensors[f"{layout.out}.bias"] = params["out"]["bias"]
    for tensor, (path, split) in layout.others.items():
        if path[0] in params and (len(path) == 1 or path[1] in params[path[0]]):
            found = params[path[0]] if len(path) == 1 else params[path[0]][path[1]]
            tensors[tensor] = found if split is None else found.reshape(1, 1, -1)
    return dict(layouts.upright(layout, tensors))


def _head(x: Any, head: int) -> Any:
    """The rows of one head, of a kernel `[D, heads, H]` or a bias `[heads, H]`."""
    return x[:, head].T if x.ndim == 3 else x[head]


def _output(layout: Layout, weight: Any) -> dict[str, Any]:
    """The output projection; a folded one as the projections of the groups, and a sum over them."""
    if layout.folded is None:
        return {f"{layout.out}.weight": weight}
    names = layout.folded_names
    unit = np.eye(weight.shape[0], dtype=weight.dtype)
    folded = dict(zip(names, split_columns(weight, len(names))))
    return {**folded, f"{layout.out}.weight": np.concatenate([unit] * len(names), axis=1)}


# -- what can be wrong ------------------------------------------------------------------------------------------------


def _check(name: str, layout: Layout, tensors: Mapping[str, Any], heads: int, kv_heads: int) -> int:
    """Checks names and shapes; returns the head size H."""
    first, blocks = next(iter(layout.weights.items()))
    rows = tensors[first].shape[0] if first in tensors else len(blocks)
    head_dim = layouts.head_dim_of(layout, tensors)
    expected = layouts.expected(layout, tensors, head_dim, heads)
    has_biases = any(bias in tensors for bias in layout.biases)
    optional = {*layout.others, f"{layout.out}.bias", *([] if has_biases else layout.biases)}
    faults = {
        "missing": [tensor for tensor in expected if tensor not in tensors and tensor not in optional],
        "unexpected": [tensor for tensor in tensors if tensor not in expected],
        "misshapen": [x for x in expected if x in tensors and not layouts.fits(tensors[x].shape, expected[x])],
        "not divisible by heads": [first] if rows % len(blocks) else [],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ValueError(
            f"These tensors do not fit layout={name!r} with heads={heads}, kv_heads={kv_heads}. {listed}. "
            f"Found {layouts.shapes(tensors)}, expected {expected}, where None is any length"
            f"{', both transposed' if layout.transposed else ''}."
        )
    return head_dim


def _check_dtypes(tensors: Mapping[str, Any]) -> None:
    """Refuses integers and floats of at most 8 bits: they need scales, which no layout has."""
    wrong = {
        name: str(x.dtype)
        for name, x in tensors.items()
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.dtype(x.dtype).itemsize < 2
    }
    if wrong:
        raise NotImplementedError(
            f"Quantised weights are not read, only floats of 16 bits and more: dtype {wrong}. Dequantise them first, "
            "with their scales."
        )


# -- arrays -----------------------------------------------------------------------------------------------------------


def concatenate(arrays: list[Any], axis: int = 0) -> Any:
    """With numpy for numpy arrays, with JAX for JAX arrays, so that JAX can differentiate a conversion."""
    if len(arrays) == 1:
        return arrays[0]
    return (np if all(isinstance(x, np.ndarray) for x in arrays) else jnp).concatenate(arrays, axis)


def split_columns(weight: Any, parts: int) -> list[Any]:
    width = weight.shape[1] // parts
    return [weight[:, part * width : (part + 1) * width] for part in range(parts)]


def _put(params: Params, where: tuple[str, ...], x: Any) -> None:
    if len(where) == 1:
        params[where[0]] = x
    else:
        params.setdefault(where[0], {})[where[1]] = x
