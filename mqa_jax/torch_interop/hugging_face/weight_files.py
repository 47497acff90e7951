"""Files of weights: which tensors they hold, and these tensors. Only requested tensors are read.

Weights are safetensors files, one or many. A `pytorch_model.bin` is only read with `torch.load(weights_only=True)`,
because a pickle may run any code.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mqa_jax.torch_interop import arrays

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL"}  # in safetensors
FOREIGN = {  # the first bytes of files that are often found instead of weights
    b"version https://git-lfs": "a Git LFS pointer, which `git lfs pull` replaces by the file",
    b"<": "a web page",
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80": "a pickle",
    b"\x1f\x8b": "gzip's",
    b"GGUF": "a GGUF file",
}


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, from the index and the headers of the files; no tensor is read."""
    for single in (SAFETENSORS, PICKLED):  # in the order of transformers
        if (folder / single).is_file():
            return dict.fromkeys(_names(folder / single), folder / single)
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _indexed(index)
    raise FileNotFoundError(
        f"There are no weights in {str(folder)!r}: {SAFETENSORS}, {PICKLED}, or one of them with .index.json."
    )


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


def read(path: Path, names: list[str]) -> Iterator[tuple[str, Any]]:
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
