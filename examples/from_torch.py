"""Replaces the attention of a PyTorch model by `mqa_jax`, layer by layer, and compares the results after each layer.

    pip install -e '.[examples,torch]'           # `make test` installs torch's small CPU build
    python examples/from_torch.py
    python examples/from_torch.py --model FOLDER-OR-FILE.gguf --text "Once upon a time" --layers 3

For each layer: the Flax module is compared with the torch layer on the layer's inputs for this text (output, cached
decoding, the worst of all gradients; errors over the largest entry, against torch in float64). Then it replaces the
layer inside the torch model, with arrays passed to JAX and back by DLPack without a copy, and the logits of the whole
model are compared with those of the original model.
"""

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from checkpoints import default_model

from mqa_jax.torch_interop import from_torch, parity, to_jax, to_tensor
from mqa_jax.torch_interop.hugging_face import attention as hf_attention

try:
    import torch
    import transformers
except ImportError as missing:
    raise SystemExit(f"{missing}. This example needs PyTorch: pip install 'mqa-jax[torch]'.") from missing

TEXT = "Multi-query attention shares one key and one value head among all heads of the queries: a cache stays small."

STEPS = 4  # the last tokens, decoded one by one after a prefill of all others


class InJax(torch.nn.Module):
    """A replacement for a decoder's attention layer: uses only the hidden states, and returns a pair."""

    def __init__(self, module: Any, variables: Any):
        super().__init__()
        self.module, self.variables = module, jax.tree.map(jax.numpy.asarray, variables)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        out = attend(self.module, self.variables, to_jax(hidden_states))
        return to_tensor(out), None


@functools.partial(jax.jit, static_argnames="module")
def attend(module: Any, variables: Any, x: jax.Array) -> jax.Array:
    return module.apply(variables, x, deterministic=True)[0]


class Step(NamedTuple):
    """Attributes: layer, its number; report, of the layer; logits, their largest change over the largest logit."""

    layer: int
    report: parity.Report
    logits: float


def load(path: Path) -> tuple[Any, Any]:
    """A model, with eager attention, and its tokenizer."""
    if not path.exists():
        raise FileNotFoundError(f"There is no model in {str(path)!r}: give a Hugging Face folder or a GGUF file.")
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder: Any = path.parent if where else path
    auto: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    model = auto.from_pretrained(folder, **options, **where).eval()
    tokenizer: Any = transformers.AutoTokenizer
    return model, tokenizer.from_pretrained(folder, local_files_only=True, **where)


def replace_layers(model: Any, tokens: torch.Tensor, layers: int | None = None) -> Iterator[Step]:
    """Replaces the attention of the model, layer by layer."""
    config = model.config.to_dict() | {"quantization_config": None}  # GGUF files have one; the weights are floats now
    family = hf_attention.attention_of(config)[1]
    if family.layout == "bert":
        raise NotImplementedError("Only decoders are supported: model_type='bert'. Give a --model of another type.")
    paths = [family.prefix.format(number).rstrip(".") for number in range(model.config.num_hidden_layers)[:layers]]
    before, inputs = logits_and_inputs(model, tokens, paths)
    for number, path in enumerate(paths):
        layer = model.get_submodule(path)
        module, variables = from_torch(layer)
        report = parity.compare(module, variables, layer, inputs[number].numpy(), prompt=tokens.shape[1] - STEPS)
        model.set_submodule(path, InJax(module, variables))
        after, _ = logits_and_inputs(model, tokens, [])
        yield Step(number, report, float((after - before).abs().max() / before.abs().max()))


@torch.no_grad()
def logits_and_inputs(
    model: Any, tokens: torch.Tensor, paths: Sequence[str]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits of the model, and the hidden states that are the inputs of these layers."""
    inputs: list[torch.Tensor] = []
    note = lambda _, arguments, options: inputs.append(arguments[0] if arguments else options["hidden_states"])
    hooks = [model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True) for path in paths]
    logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, inputs


def line(step: Step) -> str:
    errors = {difference.name: difference.ours for difference in step.report.differences}
    gradient = max((name for name in errors if name.startswith("d_")), key=errors.__getitem__)
    verdict = "same" if step.report.passed else f"DIFFERS: {step.report.worst.name}"
    return (
        f"{step.layer:5}  {errors['output']:.1e}  {errors['decoded']:.1e}  {errors[gradient]:.1e} {gradient:<24}"
        f"  {step.logits:.1e}  {verdict}"
    )


def run(options: argparse.Namespace) -> list[Step]:
    """Prints a line for each layer."""
    model, tokenizer = load(options.model or default_model())
    tokens = tokenizer(options.text, return_tensors="pt").input_ids
    if tokens.shape[1] <= STEPS:
        raise ValueError(f"More than {STEPS} tokens are needed: --text {options.text!r} has {tokens.shape[1]}.")
    print(f"layer  output   decoded  worst gradient                    logits   {tokens.shape[1]} tokens")
    steps = []
    for step in replace_layers(model, tokens, options.layers):
        print(line(step), flush=True)
        steps.append(step)
    return steps


def main(arguments: list[str] | None = None) -> list[Step]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Hugging Face folder or GGUF file; by default SmolLM2-135M")
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--layers", type=int, help="how many are replaced; by default all")
    options = parser.parse_args(arguments)
    if options.layers is not None and options.layers < 1:
        parser.error(f"at least one layer: --layers {options.layers}")
    try:
        steps = run(options)
    except (ImportError, OSError, ValueError, NotImplementedError) as error:
        print(f"examples/from_torch.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    failed = [step.layer for step in steps if not step.report.passed]
    if failed:
        raise SystemExit(f"These layers differ: {failed}. python -m mqa_jax.parity shows tensor by tensor.")
    return steps


if __name__ == "__main__":
    main()
