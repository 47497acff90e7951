"""Attention layers of a Hugging Face checkpoint on disk: `config.json` and weights. Only what is asked for is read.

Weights are safetensors files, one or many. A `pytorch_model.bin` is read by `torch.load(weights_only=True)` and in no
other way: a pickle may run any code. `pip install mqa-jax[torch]` has what both want.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mqa_jax import hf_attention, torch_arrays, torch_state_dict
from mqa_jax.modules import GroupedQueryAttention

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and weights.

    Attributes: folder.
    """

    folder: Path

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        path = self.folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"A checkpoint has a config.json: there is none in {str(self.folder)!r}.")
        return json.loads(path.read_text())

    @functools.cached_property
    def files(self) -> dict[str, Path]:
        """In which file each tensor is; from the headers of the files, so that nothing else is read."""
        found: dict[str, Path] = {}
        for path in self._weights():
            found |= dict.fromkeys(_names(path), path)
        return found

    def tensors(self, prefix: str) -> dict[str, Any]:
        """The tensors whose names start with `prefix`, under the rest of their names, in their own dtypes."""
        wanted: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            if name.startswith(prefix):
                wanted.setdefault(path, []).append(name)
        found = {name: x for path, names in wanted.items() for name, x in _read(path, names)}
        return {name.removeprefix(prefix): x for name, x in found.items()}

    @property
    def layers(self) -> int:
        """How many there are."""
        return next(self.config[name] for name in ("num_hidden_layers", "n_layer", "n_layers") if name in self.config)

    def attention(self, layer: int) -> tuple[GroupedQueryAttention, dict[str, Any]]:
        """Our module for the attention of a layer, and its variables."""
        module, family = hf_attention.attention_of(self.config, layer)
        tensors = self.tensors(self._prefix(family, layer))
        if family.layout == "bert":  # what comes after attention is in the same module there
            tensors = {name: x for name, x in tensors.items() if "LayerNorm" not in name}
        options: dict[str, Any] = dict(heads=module.heads, kv_heads=module.kv_heads, layout=family.layout)
        return module, {"params": torch_state_dict.from_state_dict(tensors, **options)}

    def _prefix(self, family: hf_attention.Family, layer: int) -> str:
        """A model without a head is saved without the name that it has in one with a head, or the other way round."""
        prefix = family.prefix.format(layer)
        shorter, longer = prefix.partition(".")[2], f"{self.config['model_type']}.{prefix}"
        candidates = [prefix, shorter, longer]
        for candidate in candidates:
            if any(name.startswith(candidate) for name in self.files):
                return candidate
        raise ValueError(
            f"There is no layer {layer} in {str(self.folder)!r}: no tensor's name starts with one of {candidates}. "
            f"It has {self.layers} layers, and tensors such as {list(self.files)[:3]}."
        )

    def _weights(self) -> list[Path]:
        for single in (SAFETENSORS, PICKLED):
            index = self.folder / f"{single}.index.json"
            if index.is_file():
                shards = sorted({self.folder / name for name in json.loads(index.read_text())["weight_map"].values()})
                absent = [path.name for path in shards if not path.is_file()]
                if absent:
                    raise FileNotFoundError(f"{index.name} names files that are not in {str(self.folder)!r}: {absent}.")
                return shards
            if (self.folder / single).is_file():
                return [self.folder / single]
        raise FileNotFoundError(
            f"There are no weights in {str(self.folder)!r}: {SAFETENSORS}, {PICKLED}, or one of them with .index.json."
        )


def _names(path: Path) -> list[str]:
    if path.suffix == ".bin":
        return list(_unpickled(path))
    with _open(path) as file:
        return list(file.keys())


def _read(path: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".bin":
        yield from ((name, torch_arrays.to_numpy(x)) for name, x in _unpickled(path).items() if name in names)
        return
    with _open(path) as file:
        for name in names:
            yield name, file.get_tensor(name)


def _open(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("Reading .safetensors files wants safetensors: pip install 'mqa-jax[torch]'.") from error
    try:
        return safetensors.safe_open(path, framework="flax")  # "numpy" has no bfloat16
    except safetensors.SafetensorError as error:
        raise ValueError(f"Truncated or damaged: {path.name} ({error}). Fetch the file again.") from error


@functools.lru_cache(maxsize=2)
def _unpickled(path: Path) -> dict[str, Any]:
    torch = torch_arrays.import_torch()
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle.UnpicklingError, RuntimeError, EOFError, by version of torch and kind of damage
        raise ValueError(
            f"{path.name} is damaged, or holds more than tensors, which only weights_only=False would load, running "
            f"whatever code is in it: {type(error).__name__}. Convert it to safetensors where you trust it."
        ) from error
