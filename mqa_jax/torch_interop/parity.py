"""Compares a Flax module with the PyTorch layer that it was converted from: outputs, gradients, cached decoding.

    python -m mqa_jax.parity PATH_TO_HF_FOLDER --layer 3 --dtype bfloat16 --json parity.json --plot parity.png

Both are also compared with the torch layer in float64, which shows the rounding error of each.
"""

import argparse
import copy
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.torch_interop import arrays, layouts, modules, state_dict

if TYPE_CHECKING:
    import torch

# Tolerances relative to the largest entry of a tensor, unless torch's own error is larger.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
ZERO = 1e-9  # a gradient in float64 counts as 0 if it is smaller than this, relative to the largest gradient


@dataclass(frozen=True)
class Difference:
    """One tensor, computed by both.

    Attributes:
      name: "output", "decoded", "context" (the input of the output projection), "d_x", or "d_" and a name of torch's.
      shape: of the tensor.
      max_abs: largest difference between the two.
      max_relative: max_abs over the largest entry, for which at least a hundredth of the largest of all gradients is
        used; for a gradient that is 0 up to rounding, as that of a key bias without RoPE, the largest of all.
      cosine: of the angle between the two.
      ours, theirs: largest error of the Flax module and of torch, over the largest entry, against torch in float64.
      worst: index of the largest difference.
      tolerance: limit of `ours`.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_relative: float
    cosine: float
    ours: float
    theirs: float
    worst: tuple[int, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance or twice torch's error; NaN never passes."""
        return self.ours <= max(self.tolerance, 2 * self.theirs)


@dataclass(frozen=True)
class Report:
    """All differences, and `errors`: |Flax - torch| of the context, `[N, B * T]`, or None if torch has no context."""

    differences: tuple[Difference, ...]
    errors: np.ndarray | None = None

    @property
    def passed(self) -> bool:
        return all(difference.passed for difference in self.differences)

    @property
    def worst(self) -> Difference:
        """The difference with the largest ratio of error to limit."""
        ratio = lambda x: x.ours / max(x.tolerance, 2 * x.theirs)
        return max(self.differences, key=lambda x: np.inf if np.isnan(x.ours) else ratio(x))

    def table(self) -> str:
        """A line for each tensor."""
        titles = ("tensor", "shape", "max abs", "max relative", "1 - cosine", "ours", "torch", "worst at", "")
        lines: list[Sequence[str]] = [titles]
        for x in self.differences:
            numbers = (f"{n:.1e}" for n in (x.max_abs, x.max_relative, 1 - x.cosine, x.ours, x.theirs))
            shape, worst = (",".join(map(str, n)) for n in (x.shape, x.worst))
            lines.append((x.name, shape, *numbers, worst, "" if x.passed else "FAILED"))
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)

    def to_json(self) -> str:
        rows = [asdict(x) | {"passed": x.passed} for x in self.differences]
        return json.dumps({"passed": self.passed, "differences": rows}, indent=2)

    def plot(self, path: Path) -> None:
        """A heat map as PNG: the difference of the context by head and row, on a logarithmic scale."""
        if self.errors is None:
            raise ValueError("There is nothing to plot: this torch layer has no single output projection.")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 0.5 + 0.35 * max(4, len(self.errors))), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(np.log10(np.maximum(self.errors, 1e-12)), aspect="auto", cmap="magma")
        axes.set(xlabel="row (batch x position)", ylabel="head", title="|ours - torch| before the output projection")
        figure.colorbar(image, label="log10")
        figure.savefig(path, dpi=120)


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

    torch_layer = _TorchLayer(torch_module, call or calls.call, layout, flax_module)
    dtype = torch_layer.dtype_name
    limit = tolerance_of(dtype) if tolerance is None else tolerance
    x = np.asarray(x, np.float64)
    cotangent = np.random.default_rng(seed).standard_normal((*x.shape[:-1], torch_layer.out_features))
    exact = torch_layer.in_float64().results(x, cotangent)
    expected = torch_layer.results(x, cotangent)
    actual = _flax_results(flax_module, variables, jnp.asarray(x, dtype), cotangent, torch_layer)
    if flax_module.causal and prompt != 0:
        prompt = x.shape[1] // 2 if prompt is None else prompt
        actual["decoded"] = _decoded(flax_module, variables, jnp.asarray(x, dtype), prompt)
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


# -- the Flax module --------------------------------------------------------------------------------------------------


def _flax_results(
    module: GroupedQueryAttention,
    variables: Mapping[str, Any],
    x: jax.Array,
    cotangent: np.ndarray,
    torch_layer: "_TorchLayer",
) -> dict[str, Any]:
    """Output, context and gradients, those of weights under torch's names."""
    params = jax.tree.map(jnp.asarray, variables["params"])
    out, (d_params, d_x) = _with_gradients(module, params, x, cotangent)
    # The derivative of the conversion, which multiplies knotgrass's two output projections.
    options: dict[str, Any] = dict(heads=module.heads, kv_heads=module.kv_heads, layout=torch_layer.layout)
    _, convert = jax.vjp(functools.partial(state_dict.from_state_dict, **options), torch_layer.weights())
    (gradients,) = convert(d_params)
    results = {"output": out, "d_x": d_x, **{f"d_{name}": gradient for name, gradient in gradients.items()}}
    if module.output_projection and torch_layer.shows_context:
        without = {name: x for name, x in params.items() if name != "out"}
        headless = module.clone(output_projection=False, out_features=None, use_out_bias=None)
        results["context"], _ = _with_gradients(headless, without, x, None)
    return results


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames="module")
def _with_gradients(module: GroupedQueryAttention, params: Any, x: jax.Array, cotangent: Any) -> Any:
    apply = lambda params, x: module.apply({"params": params}, x, deterministic=True)[0]
    if cotangent is None:
        return apply(params, x), None
    out, pull_back = jax.vjp(apply, params, x)
    return out, pull_back(jnp.asarray(cotangent, out.dtype))


@functools.partial(jax.jit, static_argnames="module")
def _step(module: GroupedQueryAttention, variables: Any, cache: Any, x: jax.Array) -> Any:
    (out, _, _), changed = module.apply({**variables, "cache": cache}, x, deterministic=True, mutable=["cache"])
    return out, changed["cache"]


def _decoded(module: GroupedQueryAttention, variables: Mapping[str, Any], x: jax.Array, prompt: int) -> np.ndarray:
    """The outputs for a prompt, and then for one token at a time, with the `cache` collection."""
    cache: Any = module.init_cache(x.shape[0], x.shape[1], x.dtype)
    outputs = []
    for chunk in _chunks(x, prompt):
        out, cache = _step(module, variables, cache, chunk)
        outputs.append(np.float64(out))
    return np.concatenate(outputs, axis=1)


def _chunks(x: Any, prompt: int) -> list[Any]:
    return [x[:, :prompt], *(x[:, i : i + 1] for i in range(prompt, x.shape[1]))]


# -- the torch layer --------------------------------------------------------------------------------------------------


class _TorchLayer:
    """The torch layer of a comparison, and the Flax module it is compared with."""

    def __init__(self, module: Any, call: Callable[..., Any], layout: str | None, flax: GroupedQueryAttention):
        self.module, self.call, self.flax = copy.deepcopy(module).eval(), call, flax
        heads, kv_heads = flax.heads, flax.kv_heads or flax.heads
        layout = modules.layout_of(module, layout)
        self.layout, self.known = layouts.find(layout, module.state_dict(), heads, kv_heads)
        self.out_features = flax.out_features or (
            flax.dim if flax.output_projection else flax.heads * (flax.head_dim or 0)
        )

    @property
    def dtype(self) -> Any:
        return next(self.module.parameters()).dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def in_float64(self) -> "_TorchLayer":
        return _TorchLayer(copy.deepcopy(self.module).double(), self.call, self.layout, self.flax)

    @property
    def shows_context(self) -> bool:
        """Whether the input of its output projection is the context of the Flax module."""
        return self.known.out is not None and self.known.folded is None

    def weights(self) -> dict[str, jax.Array]:
        state = self.module.state_dict()
        return {name: arrays.to_jax(x) for name, x in state.items() if name in self.known.names}

    def tensor(self, x: np.ndarray) -> Any:
        import torch

        return torch.tensor(x, dtype=self.dtype)

    def results(self, x: np.ndarray, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        seen: dict[str, Any] = {}
        given = self.tensor(x).requires_grad_()
        if self.shows_context:  # the module is a copy, so the hook may stay
            projection = self.module.get_submodule(self.known.out)
            projection.register_forward_pre_hook(lambda _, arguments: seen.update(context=arguments[0]))
        out = self.call(self.module, given)
        out.backward(self.tensor(cotangent))
        weights = {name: x.grad for name, x in self.module.named_parameters() if name in self.known.names}
        found = {"output": out, "d_x": given.grad, **{f"d_{name}": gradient for name, gradient in weights.items()}}
        return {name: x.detach().double().numpy() for name, x in (seen | found).items()}

    def decoded(self, x: np.ndarray, prompt: int) -> np.ndarray:
        """The outputs with torch's own cache, or, if `calls` does not support one, of the full pass."""
        import torch

        from mqa_jax.torch_interop import calls

        cache = calls.new_cache(self.module)
        chunks = [x] if cache is None else _chunks(x, prompt)
        with torch.no_grad():
            outputs = [self.call(self.module, self.tensor(chunk), cache) for chunk in chunks]
        return torch.cat(outputs, dim=1).double().numpy()


# -- the command ------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mqa_jax.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a Hugging Face checkpoint: config.json and weights")
    parser.add_argument("--layer", type=int, nargs="+", help="which layers, from 0; default all")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of weights and hidden states")
    parser.add_argument("--length", type=int, default=64, help="tokens, whose hidden states are random")
    parser.add_argument("--json", type=Path, help="a file for the differences")
    parser.add_argument("--plot", type=Path, help="a PNG of where the last layer's errors are, by head and row")
    options = parser.parse_args(arguments)
    if options.length < 1:
        parser.error(f"at least one token: --length {options.length}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[int, Report]:
    """Exit status 1: a layer differs. Exit status 2: nothing could be compared; the reason is on stderr."""
    options = parse_arguments(arguments)
    try:
        reports = _compare_folder(options)
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        hint = ". This command needs PyTorch: pip install 'mqa-jax[torch]'." if isinstance(error, ImportError) else ""
        print(f"python -m mqa_jax.parity: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        raise SystemExit(2) from error
    if options.json is not None:
        texts = {layer: json.loads(report.to_json()) for layer, report in reports.items()}
        options.json.write_text(json.dumps(texts, indent=2) + "\n")
    if options.plot is not None:
        reports[max(reports)].plot(options.plot)
    failed = {layer: report.worst.name for layer, report in reports.items() if not report.passed}
    if failed:
        raise SystemExit(f"{len(failed)} of {len(reports)} layers differ; the worst tensor of each: {failed}")
    decoded = any(x.name == "decoded" for report in reports.values() for x in report.differences)
    compared = f"outputs, gradients{', cached decoding' if decoded else ''}"
    print(f"{len(reports)} of {len(reports)} layers agree in {options.dtype}: {compared}")
    return reports


def _compare_folder(options: argparse.Namespace) -> dict[int, Report]:
    import torch
    import transformers

    from mqa_jax.torch_interop.hugging_face import attention as hf_attention
    from mqa_jax.torch_interop.hugging_face.checkpoint import Checkpoint

    checkpoint = Checkpoint(options.folder)
    layers = options.layer or range(hf_attention.layers_of(checkpoint.config))
    for layer in layers:  # before the model is loaded, which takes long
        checkpoint.attention(layer)
    dtype: Any = getattr(torch, options.dtype)
    auto: Any = transformers.AutoModel
    model = auto.from_pretrained(options.folder, dtype=dtype, attn_implementation="eager", local_files_only=True)
    reports = {}
    for layer in layers:
        module, variables = checkpoint.attention(layer)
        variables = jax.tree.map(lambda x: jnp.asarray(x, options.dtype), variables)
        family = hf_attention.FAMILIES[checkpoint.config["model_type"]]
        path = family.prefix.format(layer).rstrip(".")
        names = {name for name, _ in model.named_modules()}
        torch_module = model.get_submodule(path if path in names else path.partition(".")[2])
        x = np.random.default_rng(layer).standard_normal((1, options.length, module.dim))
        reports[layer] = compare(module.clone(parent=None), variables, torch_module, x)
        print(f"layer {layer}\n{reports[layer].table()}\n", flush=True)
    return reports
