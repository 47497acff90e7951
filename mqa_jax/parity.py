"""Proves that one of our modules computes what a PyTorch layer does: outputs, every gradient, cached decoding.

    python -m mqa_jax.parity PATH_TO_HF_FOLDER --layer 3 --dtype bfloat16 --json parity.json --plot parity.png

Both are also compared with the torch layer in float64, so that a reader sees whose rounding a difference is.
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

from mqa_jax import torch_arrays, torch_layouts, torch_modules, torch_state_dict
from mqa_jax.modules import GroupedQueryAttention

if TYPE_CHECKING:
    import torch

# Of the largest entry of a tensor, unless torch's own error is larger.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
ZERO = 1e-9  # a gradient in float64 that is that much smaller than the others is 0


@dataclass(frozen=True)
class Difference:
    """One tensor, computed by both.

    Attributes:
      name: "output", "decoded", "context" (what goes into the output projection), "d_x" or "d_" and a name of torch's.
      shape: of the tensor.
      max_abs: largest difference between the two.
      max_relative: that, over the largest entry, which counts as at least a hundredth of the largest of all gradients.
        A gradient that is 0, as that of a key bias without RoPE, is nothing but rounding: over the largest of all.
      cosine: of the angle between the two.
      ours, theirs: largest error of each, over the largest entry, against torch in float64.
      worst: where the two differ most.
      tolerance: what `ours` may be, over the largest entry.
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
        """NaN never passes."""
        return self.ours <= max(self.tolerance, 2 * self.theirs)


@dataclass(frozen=True)
class Report:
    """All differences, and `errors`: |ours - theirs| of the context, `[N, B * T]`, or None where torch shows none."""

    differences: tuple[Difference, ...]
    errors: np.ndarray | None = None

    @property
    def passed(self) -> bool:
        return all(difference.passed for difference in self.differences)

    @property
    def worst(self) -> Difference:
        """That which is furthest beyond what it may be."""
        share = lambda x: x.ours / max(x.tolerance, 2 * x.theirs)
        return max(self.differences, key=lambda x: np.inf if np.isnan(x.ours) else share(x))

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
        """A heat map as PNG: where in (head, row) the context differs, on a logarithmic scale."""
        if self.errors is None:
            raise ValueError("There is nothing to plot: this torch layer does not show what goes into its projection.")
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
      flax_module, variables: ours, as `from_torch` gives them.
      torch_module: theirs. It is run in evaluation mode.
      x: hidden states `[batch, length, features]`; the dtype of the torch layer's weights is taken.
      layout: how its weights lie, if their names do not tell; gradients of weights are compared under torch's names.
      call: `call(torch_module, x, cache)`, how it is called; default `mqa_jax.torch_calls.call`.
      prompt: tokens that go into the caches at once, before one token at a time. Default half; 0 for no decoding.
        Where `call` knows of no cache of torch's, and in any case in float64, torch's full pass is compared with.
      tolerance: of errors, over the largest entry. Default: by dtype, see TOLERANCES.
      seed: of the cotangent whose gradients are compared.
    """
    torch_arrays.import_torch()
    from mqa_jax import torch_calls

    theirs = _Torch(torch_module, call or torch_calls.call, layout, flax_module)
    dtype = theirs.dtype_name
    limit = tolerance_of(dtype) if tolerance is None else tolerance
    x = np.asarray(x, np.float64)
    cotangent = np.random.default_rng(seed).standard_normal((*x.shape[:-1], theirs.out_features))
    exact = theirs.in_float64().results(x, cotangent)
    found = theirs.results(x, cotangent)
    ours = _our_results(flax_module, variables, jnp.asarray(x, dtype), cotangent, theirs)
    if flax_module.causal and prompt != 0:
        prompt = x.shape[1] // 2 if prompt is None else prompt
        ours["decoded"] = _decoded(flax_module, variables, jnp.asarray(x, dtype), prompt)
        found["decoded"] = theirs.decoded(x, prompt) if call is None else found["output"]
        exact["decoded"] = exact["output"]
    sizes = {name: float(np.abs(x).max(initial=0.0)) for name, x in exact.items() if name.startswith("d_")}
    most = max(sizes.values())
    least = {name: most if size < ZERO * most else most / 100 for name, size in sizes.items()}
    differences = tuple(
        _difference(name, ours[name], found[name], exact[name], limit, least.get(name, 0.0)) for name in found
    )
    errors = np.abs(np.float64(ours["context"]) - found["context"]) if "context" in found else None
    if errors is not None:
        errors = errors.reshape(-1, flax_module.heads, errors.shape[-1] // flax_module.heads).max(-1).T
    return Report(differences, errors)


def tolerance_of(dtype: str) -> float:
    if dtype not in TOLERANCES:
        raise ValueError(
            f"Layers are compared in one of {list(TOLERANCES)}: dtype={dtype!r}. Cast the layer with .to()."
        )
    return TOLERANCES[dtype]


def _difference(name: str, ours: Any, theirs: Any, exact: Any, tolerance: float, least: float) -> Difference:
    ours, theirs, exact = (np.float64(x) for x in (ours, theirs, exact))
    largest = max(np.abs(exact).max(initial=0.0), least, np.finfo(np.float64).tiny)
    apart = np.abs(ours - theirs)
    lengths = np.linalg.norm(ours) * np.linalg.norm(theirs)
    return Difference(
        name,
        ours.shape,
        max_abs=float(apart.max(initial=0.0)),
        max_relative=float(apart.max(initial=0.0) / largest),
        cosine=float(np.vdot(ours, theirs) / lengths) if lengths else 1.0,
        ours=float(np.abs(ours - exact).max(initial=0.0) / largest),
        theirs=float(np.abs(theirs - exact).max(initial=0.0) / largest),
        worst=tuple(map(int, np.unravel_index(apart.argmax(), apart.shape))),
        tolerance=tolerance,
    )


# -- ours -------------------------------------------------------------------------------------------------------------


def _our_results(
    module: GroupedQueryAttention, variables: Mapping[str, Any], x: jax.Array, cotangent: np.ndarray, theirs: "_Torch"
) -> dict[str, Any]:
    """Output, context and gradients, those of weights under torch's names."""
    params = jax.tree.map(jnp.asarray, variables["params"])
    out, (d_params, d_x) = _with_gradients(module, params, x, cotangent)
    # The conversion backwards, also where it multiplies: knotgrass's two output projections.
    options: dict[str, Any] = dict(heads=module.heads, kv_heads=module.kv_heads, layout=theirs.layout)
    _, to_torchs = jax.vjp(functools.partial(torch_state_dict.from_state_dict, **options), theirs.weights())
    (gradients,) = to_torchs(d_params)
    results = {"output": out, "d_x": d_x, **{f"d_{name}": gradient for name, gradient in gradients.items()}}
    if module.output_projection and theirs.shows_context:
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
    """A prompt, and then one token at a time, through the `cache` collection."""
    cache: Any = module.init_cache(x.shape[0], x.shape[1], x.dtype)
    outputs = []
    for chunk in _chunks(x, prompt):
        out, cache = _step(module, variables, cache, chunk)
        outputs.append(np.float64(out))
    return np.concatenate(outputs, axis=1)


def _chunks(x: Any, prompt: int) -> list[Any]:
    return [x[:, :prompt], *(x[:, i : i + 1] for i in range(prompt, x.shape[1]))]


# -- theirs -----------------------------------------------------------------------------------------------------------


class _Torch:
    """A torch layer that is to be compared with."""

    def __init__(self, module: Any, call: Callable[..., Any], layout: str | None, ours: GroupedQueryAttention):
        self.module, self.call, self.ours = copy.deepcopy(module).eval(), call, ours
        heads, kv_heads = ours.heads, ours.kv_heads or ours.heads
        layout = torch_modules.layout_of(module, layout)
        self.layout, self.known = torch_layouts.find(layout, module.state_dict(), heads, kv_heads)
        self.out_features = ours.out_features or (
            ours.dim if ours.output_projection else ours.heads * (ours.head_dim or 0)
        )

    @property
    def dtype(self) -> Any:
        return next(self.module.parameters()).dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def in_float64(self) -> "_Torch":
        return _Torch(copy.deepcopy(self.module).double(), self.call, self.layout, self.ours)

    @property
    def shows_context(self) -> bool:
        """Whether what goes into its output projection is our context."""
        return self.known.out is not None and self.known.folded is None

    def weights(self) -> dict[str, jax.Array]:
        state = self.module.state_dict()
        return {name: torch_arrays.to_jax(x) for name, x in state.items() if name in self.known.names}

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
        """By torch's own cache, or, if it has none that is known, by the full pass."""
        import torch

        from mqa_jax import torch_calls

        cache = torch_calls.new_cache(self.module)
        chunks = [x] if cache is None else _chunks(x, prompt)
        with torch.no_grad():
            outputs = [self.call(self.module, self.tensor(chunk), cache) for chunk in chunks]
        return torch.cat(outputs, dim=1).double().numpy()


# -- the command ------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mqa_jax.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    """Status 1: a layer differs. Status 2: nothing could be compared; stderr says why."""
    options = parse_arguments(arguments)
    try:
        reports = _compare_folder(options)
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        wants = ". This command wants PyTorch: pip install 'mqa-jax[torch]'." if isinstance(error, ImportError) else ""
        print(f"python -m mqa_jax.parity: {' '.join(str(error).split())}{wants}", file=sys.stderr)
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

    from mqa_jax import hf_attention
    from mqa_jax.hf_checkpoint import Checkpoint

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
        theirs = model.get_submodule(path if path in names else path.partition(".")[2])
        x = np.random.default_rng(layer).standard_normal((1, options.length, module.dim))
        reports[layer] = compare(module.clone(parent=None), variables, theirs, x)
        print(f"layer {layer}\n{reports[layer].table()}\n", flush=True)
    return reports


if __name__ == "__main__":
    main()
