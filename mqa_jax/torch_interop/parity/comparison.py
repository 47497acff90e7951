"""Runs both layers, and compares everything that they compute."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.torch_interop import arrays
from mqa_jax.torch_interop.parity import flax_side
from mqa_jax.torch_interop.parity.report import Difference, Report
from mqa_jax.torch_interop.parity.torch_side import TorchLayer

if TYPE_CHECKING:
    import torch

# Tolerances relative to the largest entry of a tensor, unless torch's own error is larger.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
ZERO = 1e-9  # a gradient in float64 counts as 0 if it is smaller than this, relative to the largest gradient


def compare(
    flax_module: GroupedQueryAttention,
    variables: Mapping[str, Any],
    torch_module: "torch.nn.Module",
    x: Any,
    *,
    layout: str | None = None,
    call: Callable[..., "torch.Tensor"] | None = None,
    prompt: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Runs both on `x` and compares everything that they compute.

    Args:
      flax_module, variables: as `from_torch` returns them.
      torch_module: the torch layer. It runs in evaluation mode.
      x: hidden states `[batch, length, features]`; they are converted to the dtype of the torch layer's weights.
      layout: a name of `torch_interop.layouts`, if the names of the weights do not identify it. Gradients of weights
        are compared under torch's names.
      call: `call(torch_module, x, cache)` calls the torch layer; default `mqa_jax.torch_interop.calls.call`.
      prompt: number of tokens that are cached at once, before one token at a time. Default half; 0 for no decoding.
        If `call` does not support a cache of the torch layer, and always in float64, torch's full pass is used.
      tolerance: of errors, over the largest entry. Default: by dtype, see TOLERANCES.
      seed: of the random cotangent of the gradients.
    """
    arrays.import_torch()
    from mqa_jax.torch_interop import calls

    torch_layer = TorchLayer(torch_module, call or calls.call, layout, flax_module)
    dtype = torch_layer.dtype_name
    limit = tolerance_of(dtype) if tolerance is None else tolerance
    x = np.asarray(x, np.float64)
    cotangent = np.random.default_rng(seed).standard_normal((*x.shape[:-1], torch_layer.out_features))
    exact = torch_layer.in_float64().results(x, cotangent)
    expected = torch_layer.results(x, cotangent)
    actual = flax_side.results(flax_module, variables, jnp.asarray(x, dtype), cotangent, torch_layer)
    if flax_module.causal and prompt != 0:
        prompt = x.shape[1] // 2 if prompt is None else prompt
        actual["decoded"] = flax_side.decoded(flax_module, variables, jnp.asarray(x, dtype), prompt)
        expected["decoded"] = torch_layer.decoded(x, prompt) if call is None else expected["output"]
        exact["decoded"] = exact["output"]
    sizes = {name: float(np.abs(x).max(initial=0.0)) for name, x in exact.items() if name.startswith("d_")}
    largest = max(sizes.values())
    scales = {name: largest if size < ZERO * largest else largest / 100 for name, size in sizes.items()}
    differences = tuple(
        _difference(name, actual[name], expected[name], exact[name], limit, scales.get(name, 0.0)) for name in expected
    )
    errors = np.abs(np.float64(actual["context"]) - expected["context"]) if "context" in expected else None
    if errors is not None:
        errors = errors.reshape(-1, flax_module.heads, errors.shape[-1] // flax_module.heads).max(-1).T
    return Report(differences, errors)


def tolerance_of(dtype: str) -> float:
    if dtype not in TOLERANCES:
        raise ValueError(
            f"Layers are compared in one of {list(TOLERANCES)}: dtype={dtype!r}. Cast the layer with .to()."
        )
    return TOLERANCES[dtype]


def _difference(name: str, actual: Any, expected: Any, exact: Any, tolerance: float, min_scale: float) -> Difference:
    actual, expected, exact = (np.float64(x) for x in (actual, expected, exact))
    scale = max(np.abs(exact).max(initial=0.0), min_scale, np.finfo(np.float64).tiny)
    difference = np.abs(actual - expected)
    norms = np.linalg.norm(actual) * np.linalg.norm(expected)
    return Difference(
        name,
        actual.shape,
        max_abs=float(difference.max(initial=0.0)),
        max_relative=float(difference.max(initial=0.0) / scale),
        cosine=float(np.vdot(actual, expected) / norms) if norms else 1.0,
        ours=float(np.abs(actual - exact).max(initial=0.0) / scale),
        theirs=float(np.abs(expected - exact).max(initial=0.0) / scale),
        worst=tuple(map(int, np.unravel_index(difference.argmax(), difference.shape))),
        tolerance=tolerance,
    )
