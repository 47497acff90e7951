"""Attention layers of a Hugging Face checkpoint on disk: `config.json` and weights. Only requested tensors are read.

Weights are safetensors files, one or many. A `pytorch_model.bin` is only read with `torch.load(weights_only=True)`,
because a pickle may run any code. `pip install mqa-jax[torch]` installs the requirements of both.

Unknown settings and dtypes, and files that do not match their index, are errors.
"""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.positions import Rope
from mqa_jax.torch_interop import state_dict
from mqa_jax.torch_interop.hugging_face import attention as hf_attention
from mqa_jax.torch_interop.hugging_face import weight_files

LAYER_COUNTS = "num_hidden_layers", "n_layer", "n_layers"
QUANTIZATION = "quantization_config", "compression_config"
ROTARY = "rotary_emb.inv_freq"  # in files of transformers before 4.32


class Config(dict[str, Any]):
    """The contents of a `config.json`; reading a missing setting raises a ValueError with its name."""

    def __init__(self, settings: Mapping[str, Any], path: Path):
        super().__init__(settings)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"There is no {name!r} in {str(self.path)!r}.")


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and weights. Files that have changed are read again.

    Attributes: folder, in which "~" is the home folder.
    """

    folder: str | os.PathLike[str]

    @property
    def path(self) -> Path:
        """The folder's path, with "~" expanded."""
        return Path(self.folder).expanduser()

    @property
    def config(self) -> Config:
        path = self.path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"A checkpoint has a config.json: there is none in {str(self.path)!r}.")
        config = Config(weight_files.read_json(path), path)
        if not isinstance(config["model_type"], str):
            raise ValueError(f"A model_type is a name: model_type={config['model_type']!r} in {str(path)!r}.")
        return config

    @property
    def files(self) -> dict[str, Path]:
        """The file of each tensor, from the index and the headers of the files; no tensor is read."""
        if (self.path / "adapter_config.json").exists():
            raise NotImplementedError(
                f"There is an adapter_config.json in {str(self.path)!r}: transformers would add the adapter to the "
                "weights, this reader does not. Merge it (peft: merge_and_unload), and save the model."
            )
        return weight_files.tensor_files(self.path)

    def tensors(self, prefix: str) -> dict[str, Any]:
        """The tensors whose names start with `prefix`, under the rest of their names, in their own dtypes.

        They are numpy arrays, so that float64 is kept also without `jax_enable_x64`.
        """
        names_by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            if name.startswith(prefix):
                names_by_file.setdefault(path, []).append(name)
        found = {name: x for path, names in names_by_file.items() for name, x in weight_files.read(path, names)}
        return {name.removeprefix(prefix): x for name, x in found.items()}

    @property
    def layers(self) -> int:
        """The number of layers."""
        config = self.config
        counts = {name: config[name] for name in LAYER_COUNTS if name in config}
        if len(set(counts.values())) != 1:
            raise ValueError(f"One of {LAYER_COUNTS} is the number of layers: {counts} in {str(config.path)!r}.")
        (count,) = set(counts.values())
        if type(count) is not int or count < 1:
            raise ValueError(f"The number of layers is a positive integer: {counts} in {str(config.path)!r}.")
        return count

    def attention(self, layer: int) -> tuple[GroupedQueryAttention, dict[str, Any]]:
        """The Flax module for the attention of a layer, and its variables."""
        config = self.config
        _check_not_quantized(config)
        if not 0 <= layer < self.layers:
            raise ValueError(f"There is no layer {layer} in {str(self.path)!r}: they are 0 to {self.layers - 1}.")
        module, family = hf_attention.attention_of(config, layer)
        prefix = self._prefix(family, layer)
        tensors = _without_frequencies(self.tensors(prefix), module.rope, prefix)
        options: dict[str, Any] = dict(heads=module.heads, kv_heads=module.kv_heads, layout=family.layout)
        params = state_dict.from_state_dict(tensors, **options)
        _check_complete(module, params, f"{prefix}* in {str(self.path)!r}")
        return module, {"params": params}

    def _prefix(self, family: hf_attention.Family, layer: int) -> str:
        """The prefix in this file: models with and without a head are saved with and without the model's name."""
        files = self.files
        prefix = family.prefix.format(layer)
        shorter, longer = prefix.partition(".")[2], f"{self.config['model_type']}.{prefix}"
        candidates = [prefix, shorter, longer]
        found = [prefix for prefix in candidates if any(name.startswith(prefix) for name in files)]
        if not found:
            raise ValueError(
                f"There is no layer {layer} in {str(self.path)!r}: no tensor's name starts with one of {candidates}. "
                f"It has {self.layers} layers, and tensors such as {list(files)[:3]}."
            )
        if len(found) > 1:
            raise ValueError(f"There is more than one layer {layer} in {str(self.path)!r}: {found}.")
        return found[0]


def _check_not_quantized(config: Config) -> None:
    for name in QUANTIZATION:
        settings = config.get(name)
        if settings:
            method = settings.get("quant_method", settings) if isinstance(settings, dict) else settings
            raise NotImplementedError(
                f"Quantised weights are not supported: {name} with quant_method={method!r} in {str(config.path)!r}. "
                "Dequantise them, and save the model without it."
            )


def _check_complete(module: GroupedQueryAttention, params: dict[str, Any], where: str) -> None:
    """Compares with the module's own parameters: Flax ignores those that a module does not have, such as biases."""
    x = jax.ShapeDtypeStruct((1, 1, module.dim), jnp.float32)
    initialise = functools.partial(module.init, deterministic=True)
    expected = jax.eval_shape(initialise, jax.random.key(0), x)["params"]
    shapes = lambda tree: {jax.tree_util.keystr(at): x.shape for at, x in jax.tree_util.tree_leaves_with_path(tree)}
    settings, file = shapes(expected), shapes(params)
    differing = {name: (settings.get(name), file.get(name)) for name in settings | file}
    differing = {name: pair for name, pair in differing.items() if pair[0] != pair[1]}
    if differing:
        raise ValueError(
            f"The tensors {where} are not those of the attention that config.json describes. Flax names, with shapes "
            f"by config.json and in the file: {differing}. One of the two belongs to another model."
        )


def _without_frequencies(tensors: dict[str, Any], rope: Rope | None, prefix: str) -> dict[str, Any]:
    """Removes the frequencies of RoPE in old files, if they are those that follow from the config."""
    if ROTARY not in tensors:
        return tensors
    stored = np.asarray(tensors[ROTARY], np.float32)
    if rope is None or not np.allclose(
        stored, rope.frequencies(2 * stored.size), rtol=0.01
    ):  # it may be half precision
        raise NotImplementedError(f"{prefix}{ROTARY} has other frequencies than those of config.json: rope={rope}.")
    return {name: x for name, x in tensors.items() if name != ROTARY}
