"""Attention layers of a Hugging Face checkpoint on disk: `config.json` and weights. Only requested tensors are read.

Weights are safetensors files, one or many. A `pytorch_model.bin` is only read with `torch.load(weights_only=True)`,
because a pickle may run any code. `pip install mqa-jax[torch]` installs the requirements of both.

Unknown settings and dtypes, and files that do not match their index, are errors.
"""

import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.positions import Rope
from mqa_jax.torch_interop import arrays, state_dict
from mqa_jax.torch_interop.hugging_face import attention as hf_attention

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
LAYER_COUNTS = "num_hidden_layers", "n_layer", "n_layers"
QUANTIZATION = "quantization_config", "compression_config"
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}  # in safetensors
ROTARY = "rotary_emb.inv_freq"  # in files of transformers before 4.32
FOREIGN = {  # the first bytes of files that are often found instead of weights
    b"version https://git-lfs": "a Git LFS pointer, which `git lfs pull` replaces by the file",
    b"<": "a web page",
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a pickle",
    b"\x1f\x8b": "gzip's",
    b"GGUF": "a GGUF file",
}


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
        config = Config(read_json(path), path)
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
        for single in (SAFETENSORS, PICKLED):  # in the order of transformers
            if (self.path / single).is_file():
                return dict.fromkeys(_names(self.path / single), self.path / single)
            index = self.path / f"{single}.index.json"
            if index.is_file():
                return _indexed(index)
        raise FileNotFoundError(
            f"There are no weights in {str(self.path)!r}: {SAFETENSORS}, {PICKLED}, or one of them with .index.json."
        )

    def tensors(self, prefix: str) -> dict[str, Any]:
        """The tensors whose names start with `prefix`, under the rest of their names, in their own dtypes.

        They are numpy arrays, so that float64 is kept also without `jax_enable_x64`.
        """
        names_by_file: dict[Path, list[str]] = {}
        for name, path in self.files.items():
            if name.startswith(prefix):
                names_by_file.setdefault(path, []).append(name)
        found = {name: x for path, names in names_by_file.items() for name, x in _read(path, names)}
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not JSON{_instead(path)}: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{str(path)!r} holds a JSON object, not a {type(settings).__name__}.")
    return settings


def foreign(path: Path) -> str | None:
    """The kind of a file that is not weights or settings, if its first bytes are those of a known kind."""
    with path.open("rb") as file:
        start = file.read(32).lstrip().lower()
    if not start:
        return "an empty file"
    return next((what for begins, what in FOREIGN.items() if start.startswith(begins.lower())), None)


def _instead(path: Path) -> str:
    what = foreign(path)
    return "" if what is None else f", but {what}"


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


# -- files ------------------------------------------------------------------------------------------------------------


def _indexed(index: Path) -> dict[str, Path]:
    """The file of each tensor from the `weight_map` of an index, after a comparison with the files."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{str(index)!r} has a weight_map, from the names of tensors to those of files.")
    paths = {name: _shard(index, name) for name in sorted(set(places.values()))}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{index.name} names files that are not in {str(index.parent)!r}: {absent}.")
    inside = {name: set(_names(path)) for name, path in paths.items()}
    missing = {tensor: name for tensor, name in places.items() if tensor not in inside[name]}
    unnamed = {tensor: name for name, tensors in inside.items() for tensor in tensors if tensor not in places}
    for wrong, what in ((missing, "are not in the file of its weight_map"), (unnamed, "are not in its weight_map")):
        if wrong:
            raise ValueError(
                f"{index.name} and its files in {str(index.parent)!r} are not of one model: {len(wrong)} tensors "
                f"{what}, such as {dict(sorted(wrong.items())[:3])}."
            )
    return {tensor: paths[name] for tensor, name in places.items()}


def _shard(index: Path, name: str) -> Path:
    """The file that an index names: in its own folder and of its own kind, because other files may be pickles."""
    path, suffix = index.parent / name, Path(index.name.removesuffix(".index.json")).suffix
    if Path(name).name != name or name.startswith(".") or "\\" in name:
        raise ValueError(f"An index names files in its own folder: {name!r} in {str(index)!r}.")
    if path.suffix != suffix:
        raise ValueError(f"This index names files that end in {suffix!r}: {name!r} in {str(index)!r}.")
    target, folder = path.resolve(), index.parent.resolve()
    if target.parent not in (folder, folder.parents[1] / "blobs"):  # huggingface_hub's cache links to its blobs
        raise ValueError(
            f"An index names files in its own folder: {name!r} in {str(index)!r} is a link to {str(target)!r}. "
            "Copy the file, or pass the folder that it is in."
        )
    return path


def _names(path: Path) -> list[str]:
    return _names_at(path, _stamp(path))


@functools.lru_cache(maxsize=512)
def _names_at(path: Path, stamp: tuple[int, ...]) -> list[str]:
    if path.suffix == ".bin":
        return list(_unpickled(path, stamp))
    with _open(path) as file:
        return list(file.keys())


def _read(path: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".bin":
        tensors = _unpickled(path, _stamp(path))
        for name in names:
            _check_dtype(path, name, str(tensors[name].dtype), "float8" not in str(tensors[name].dtype))
            yield name, arrays.to_numpy(tensors[name])
        return
    with _open(path) as file:
        for name in names:
            dtype = file.get_slice(name).get_dtype()
            _check_dtype(path, name, dtype, dtype in DTYPES)
            yield name, file.get_tensor(name)


def _check_dtype(path: Path, name: str, dtype: str, known: bool) -> None:
    if not known:
        raise NotImplementedError(
            f"Quantised weights are not supported: {name!r} in {str(path)!r} is {dtype}. Dequantise them, to bfloat16 "
            "or float32."
        )


def _stamp(path: Path) -> tuple[int, ...]:
    """Identifies the contents of a file; it changes if the file is replaced or written to."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _open(path: Path) -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("Reading .safetensors files needs safetensors: pip install 'mqa-jax[torch]'.") from error
    try:
        return safetensors.safe_open(path, framework="numpy")  # "flax" would narrow 64 bits
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"Truncated or damaged: {path.name} ({error}){_instead(path)}. Fetch the file again."
        ) from error


@functools.lru_cache(maxsize=2)
def _unpickled(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    torch = arrays.import_torch()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle.UnpicklingError, RuntimeError, EOFError, by version of torch and kind of damage
        raise ValueError(
            f"{path.name} is damaged, or holds more than tensors. weights_only=False would load it and run any code in "
            f"it: {type(error).__name__}{_instead(path)}. If you trust the file, convert it to safetensors."
        ) from error
    entries = tensors if isinstance(tensors, dict) else {type(tensors).__name__: tensors}
    others = [name for name, x in entries.items() if not isinstance(x, torch.Tensor)]
    if others:
        raise ValueError(f"{path.name} holds more than named tensors: {others[:3]}. Save only a model's state_dict().")
    return tensors
