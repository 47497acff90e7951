"""What the Flax module of a comparison computes."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.torch_interop import state_dict
from mqa_jax.torch_interop.parity.torch_side import TorchLayer, chunks_of


def results(
    module: GroupedQueryAttention,
    variables: Mapping[str, Any],
    x: jax.Array,
    cotangent: np.ndarray,
    torch_layer: TorchLayer,
) -> dict[str, Any]:
    """Output, context and gradients, those of weights under torch's names."""
    params = jax.tree.map(jnp.asarray, variables["params"])
    out, (d_params, d_x) = _with_gradients(module, params, x, cotangent)
    # The derivative of the conversion, which multiplies knotgrass's two output projections.
    options: dict[str, Any] = dict(heads=module.heads, kv_heads=module.kv_heads, layout=torch_layer.layout)
    _, convert = jax.vjp(functools.partial(state_dict.from_state_dict, **options), torch_layer.weights())
    (gradients,) = convert(d_params)
    found = {"output": out, "d_x": d_x, **{f"d_{name}": gradient for name, gradient in gradients.items()}}
    if module.output_projection and torch_layer.shows_context:
        without = {name: x for name, x in params.items() if name != "out"}
        headless = module.clone(output_projection=False, out_features=None, use_out_bias=None)
        found["context"], _ = _with_gradients(headless, without, x, None)
    return found


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames="module")
def _with_gradients(module: GroupedQueryAttention, params: Any, x: jax.Array, cotangent: Any) -> Any:
    apply = lambda params, x: module.apply({"params": params}, x, deterministic=True)[0]
    if cotangent is None:
        return apply(params, x), None
    out, pull_back = jax.vjp(apply, params, x)
    return out, pull_back(jnp.asarray(cotangent, out.dtype))


@functools.partial(jax.jit, static_argnames="module")
def step(module: GroupedQueryAttention, variables: Any, cache: Any, x: jax.Array) -> Any:
    (out, _, _), changed = module.apply({**variables, "cache": cache}, x, deterministic=True, mutable=["cache"])
    return out, changed["cache"]


def decoded(module: GroupedQueryAttention, variables: Mapping[str, Any], x: jax.Array, prompt: int) -> np.ndarray:
    """The outputs for a prompt, and then for one token at a time, with the `cache` collection."""
    cache: Any = module.init_cache(x.shape[0], x.shape[1], x.dtype)
    outputs = []
    for chunk in chunks_of(x, prompt):
        out, cache = step(module, variables, cache, chunk)
        outputs.append(np.float64(out))
    return np.concatenate(outputs, axis=1)
