"""Compares a Flax module with the PyTorch layer that it was converted from: outputs, gradients, cached decoding.

    python -m mqa_jax.parity PATH_TO_HF_FOLDER --layer 3 --dtype bfloat16 --json parity.json --plot parity.png

Both are also compared with the torch layer in float64, which shows the rounding error of each.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mqa_jax.torch_interop.parity.comparison import TOLERANCES, compare
from mqa_jax.torch_interop.parity.report import Report


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
