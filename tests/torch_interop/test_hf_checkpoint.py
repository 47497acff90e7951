"""Checkpoints on disk: which tensors are read, in which dtype, and what is said of files that are not right."""

import functools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from mqa_jax.torch_interop.hugging_face import weight_files
from mqa_jax.torch_interop.hugging_face.checkpoint import Checkpoint

CONFIG: dict[str, Any] = dict(
    model_type="llama", hidden_size=24, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2
)
SHAPES = {"q_proj": (24, 24), "k_proj": (8, 24), "v_proj": (8, 24), "o_proj": (24, 24)}


def layer(number: int, prefix: str = "model.layers") -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(number), 4)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, SHAPES.values())]
    return {f"{prefix}.{number}.self_attn.{name}.weight": x for name, x in zip(SHAPES, arrays)}


def write(folder: Path, config: dict[str, Any] = CONFIG, **files: dict[str, jax.Array]) -> Checkpoint:
    """One file, or several with an index."""
    (folder / "config.json").write_text(json.dumps(config))
    names = {"model": "model.safetensors"} if set(files) == {"model"} else {n: f"{n}.safetensors" for n in files}
    for name, tensors in files.items():
        save_file(tensors, folder / names[name])
    if len(names) > 1:
        index = {tensor: names[name] for name, tensors in files.items() for tensor in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return Checkpoint(folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_layer_in_its_own_dtype(tmp_path, sharded):
    files = {"one": layer(0), "two": layer(1)} if sharded else {"model": layer(0) | layer(1)}
    module, variables = write(tmp_path, **files).attention(1)
    assert (module.heads, module.kv_heads, module.head_dim) == (6, 2, 4)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    query = layer(1)["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(variables["params"]["query"]["kernel"].reshape(24, 24).T, query)
    assert module.apply(variables, jnp.ones((1, 3, 24), jnp.bfloat16))[0].shape == (1, 3, 24)


def test_only_the_files_of_a_layer_are_read(tmp_path, monkeypatch):
    checkpoint = write(tmp_path, one=layer(0), two=layer(1))
    assert len(checkpoint.files) == 8
    opened: list[str] = []
    really = weight_files._open

    def spy(path):
        opened.append(path.name)
        return really(path)

    monkeypatch.setattr(weight_files, "_open", spy)
    checkpoint.attention(1)
    assert opened == ["two.safetensors"]


@pytest.mark.parametrize("prefix", ["layers", "llama.model.layers"])
def test_a_model_saved_without_its_head_or_inside_another(tmp_path, prefix):
    _, variables = write(tmp_path, model=layer(0, prefix)).attention(0)
    assert variables["params"]["key"]["kernel"].shape == (24, 2, 4)


def _truncated(folder: Path) -> Checkpoint:
    checkpoint = write(folder, model=layer(0))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return checkpoint


def _no_shard(folder: Path) -> Checkpoint:
    checkpoint = write(folder, one=layer(0), two=layer(1))
    (folder / "two.safetensors").unlink()
    return checkpoint


def _no_weights(folder: Path) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Checkpoint(folder)


def _half(folder: Path) -> Checkpoint:
    return write(folder, model={name: x for name, x in layer(0).items() if "v_proj" not in name})


def _without(package: str, folder: Path) -> Any:
    """Where it is not installed."""
    checkpoint = write(folder, model=layer(0))
    if package == "torch":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with mock.patch.dict(sys.modules, {package: None}):
        return checkpoint.attention(0)


def _evil(folder: Path) -> Checkpoint:
    """A pickle that would run code."""
    checkpoint = _no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    return checkpoint


def _with(folder: Path, **settings: Any) -> Checkpoint:
    """Other settings; those that are None are left out."""
    merged = {name: x for name, x in {**CONFIG, **settings}.items() if x is not None}
    return write(folder, merged, model=layer(0) | layer(1))


def _config_of(text: bytes) -> Any:
    def make(folder: Path) -> Checkpoint:
        checkpoint = write(folder, model=layer(0))
        (folder / "config.json").write_bytes(text)
        return checkpoint

    return make


def _weights_of(data: bytes, name: str = "model.safetensors") -> Any:
    def make(folder: Path) -> Checkpoint:
        checkpoint = _no_weights(folder)
        (folder / name).write_bytes(data)
        return checkpoint

    return make


def _index_of(text: bytes) -> Any:
    def make(folder: Path) -> Checkpoint:
        checkpoint = write(folder, one=layer(0), two=layer(1))
        (folder / "model.safetensors.index.json").write_bytes(text)
        return checkpoint

    return make


def _header(**tensors: Any) -> bytes:
    """Of a safetensors file of 12 bytes of data."""
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + bytes(12)


def _elsewhere(name: str) -> Any:
    """An index that names a file, which is there, outside its folder."""

    def make(folder: Path) -> Checkpoint:
        (folder / "model").mkdir()
        checkpoint = write(folder / "model", one=layer(0), two=layer(1))
        (folder / "model/two.safetensors").rename(folder / "two.safetensors")
        (folder / "model/link.safetensors").symlink_to("../two.safetensors")
        (folder / "model/folder").symlink_to("..")
        path = folder / "model/model.safetensors.index.json"
        path.write_text(path.read_text().replace("two.safetensors", name.format(folder)))
        return checkpoint

    return make


def _pickle_of_more(folder: Path) -> Checkpoint:
    import torch

    torch.save({"weight": torch.ones(2), "epoch": 3}, folder / "pytorch_model.bin")
    return _no_weights(folder)


def _pickle_of_float8(folder: Path) -> Checkpoint:
    import torch

    torch.save({Q_PROJ: torch.ones(2).to(torch.float8_e4m3fn)}, folder / "pytorch_model.bin")
    return _no_weights(folder)


def _index_to_a_pickle(folder: Path) -> Checkpoint:
    checkpoint = _evil(folder)
    index = {"weight_map": dict.fromkeys(layer(0), "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def _remapped(folder: Path, change: Any) -> Checkpoint:
    """Two files whose index somebody has edited."""
    checkpoint = write(folder, one=layer(0), two=layer(1))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return checkpoint


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def _quantized(folder: Path, dtype: Any, **more: jax.Array) -> Checkpoint:
    tensors = layer(0)
    return write(folder, model=tensors | {Q_PROJ: tensors[Q_PROJ].astype(dtype), **more})


class _Third(Checkpoint):
    """Whatever layer is asked for."""

    def attention(self, layer: int) -> Any:
        return super().attention(2)


def _one_of_three(folder: Path) -> Checkpoint:
    """There are tensors of a layer that the config does not have."""
    return _Third(write(folder, model=layer(1) | layer(2)).folder)


def _adapter(folder: Path) -> Checkpoint:
    (folder / "adapter_config.json").write_text("{}")
    return write(folder, model=layer(0))


def _rotary(folder: Path, frequencies: jax.Array) -> Checkpoint:
    return write(folder, model=layer(0) | {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})


def _other_biases(*features: int) -> dict[str, jax.Array]:
    names = zip(("k_proj", "v_proj", "o_proj"), (features[1], features[1], features[0]))
    return {f"model.layers.0.self_attn.{name}.bias": jnp.ones(n) for name, n in names}


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no config": (Checkpoint, FileNotFoundError, "A checkpoint has a config.json: there is none in"),
    "no weights": (_no_weights, FileNotFoundError, "There are no weights in .*: model.safetensors, pytorch_model.bin"),
    "no shard": (_no_shard, FileNotFoundError, r"names files that are not in .*: \['two.safetensors'\]"),
    "truncated": (_truncated, ValueError, r"Truncated or damaged: model.safetensors \(.*\). Fetch the file again"),
    "half a layer": (_half, ValueError, "missing: v_proj.weight. Found"),
    "no such layer": (
        lambda folder: write(folder, model=layer(1)),
        ValueError,
        r"There is no layer 0 in .*'model.layers.0.self_attn.', .*It has 2 layers, and tensors such as",
    ),
    "a layer twice": (
        lambda folder: write(folder, model=layer(0) | layer(0, "layers")),
        ValueError,
        r"There is more than one layer 0 in .*: \['model.layers.0.self_attn.', 'layers.0.self_attn.'\]",
    ),
    "a layer beyond the last": (_one_of_three, ValueError, "There is no layer 2 in .*: they are 0 to 1"),
    "config: not JSON": (_config_of(b"{'model_type': 'llama'}"), ValueError, r"config.json' is not JSON: Expecting"),
    "config: empty": (_config_of(b""), ValueError, "config.json' is not JSON, but an empty file"),
    "config: not text": (_config_of(b"\xff\xfe{}"), ValueError, "config.json' is not JSON: 'utf-8' codec"),
    "config: a web page": (_config_of(b"<!DOCTYPE html>"), ValueError, "config.json' is not JSON, but a web page"),
    "config: a list": (_config_of(b"[]"), ValueError, "config.json' holds a JSON object, not a list"),
    "config: no model_type": (lambda folder: _with(folder, model_type=None), ValueError, "There is no 'model_type' in"),
    "config: model_type": (
        lambda folder: _with(folder, model_type=1),
        ValueError,
        "A model_type is a name: model_type=1",
    ),
    "config: no heads": (
        lambda folder: _with(folder, num_attention_heads=None),
        ValueError,
        "'num_attention_heads'",
    ),
    "config: no layers": (
        lambda folder: _with(folder, num_hidden_layers=None),
        ValueError,
        r"One of \('num_hidden_layers', 'n_layer', 'n_layers'\) is the number of layers: {}",
    ),
    "config: two numbers of layers": (lambda folder: _with(folder, n_layer=3), ValueError, "'n_layer': 3} in"),
    "config: layers": (
        lambda folder: _with(folder, num_hidden_layers="2"),
        ValueError,
        "The number of layers is a positive integer: {'num_hidden_layers': '2'}",
    ),
    "quantization_config": (
        lambda folder: _with(folder, quantization_config=dict(quant_method="gptq", bits=4)),
        NotImplementedError,
        "Quantised weights are not supported: quantization_config with quant_method='gptq'",
    ),
    "compression_config": (
        lambda folder: _with(folder, compression_config=dict(format="pack-quantized")),
        NotImplementedError,
        "compression_config with quant_method={'format'",
    ),
    "float8": (
        lambda folder: _quantized(folder, jnp.float8_e4m3fn),
        NotImplementedError,
        "'model.layers.0.self_attn.q_proj.weight' in '.*model.safetensors' is F8_E4M3. Dequantise",
    ),
    "integers": (
        lambda folder: _quantized(folder, jnp.int8),
        NotImplementedError,
        "Quantised weights are not read, .*int8.*Dequantise them first",
    ),
    "biases that the config denies": (
        lambda folder: write(
            folder, model=layer(0) | {Q_PROJ.replace("weight", "bias"): jnp.ones(24), **_other_biases(24, 8)}
        ),
        ValueError,
        r"are not those of the attention that config.json describes.*\['key'\]\['bias'\]\": \(None, \(2, 4\)\)",
    ),
    "another number of features": (
        lambda folder: write(folder, config=CONFIG | {"head_dim": 8}, model=layer(0)),
        ValueError,
        "q_proj.weight|are not those of the attention",
    ),
    "scales": (
        lambda folder: _quantized(folder, jnp.int8, **{f"{Q_PROJ}_scale": jnp.ones(1)}),
        NotImplementedError,
        "Quantised weights are not read, .*int8.*with their scales",
    ),
    "an adapter": (_adapter, NotImplementedError, "There is an adapter_config.json in .* Merge it"),
    "other frequencies": (
        lambda folder: _rotary(folder, jnp.array([1.0, 0.5])),
        NotImplementedError,
        "model.layers.0.self_attn.rotary_emb.inv_freq has other frequencies than those of config.json",
    ),
    "empty": (_weights_of(b""), ValueError, r"Truncated or damaged: model.safetensors \(.*\), but an empty file"),
    "Git LFS": (
        _weights_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        ValueError,
        r"model.safetensors \(.*\), but a Git LFS pointer, which `git lfs pull` replaces",
    ),
    "a web page": (_weights_of(b"\n<html>Not found"), ValueError, r"model.safetensors \(.*\), but a web page"),
    "a zip archive": (
        _weights_of(b"PK\x03\x04" + bytes(30)),
        ValueError,
        r"model.safetensors \(.*\), but a zip archive",
    ),
    "GGUF": (_weights_of(b"GGUF" + bytes(30)), ValueError, r"model.safetensors \(.*\), but a GGUF file"),
    "a header of exabytes": (_weights_of(b"\xff" * 8 + b"{}"), ValueError, "Truncated or damaged: model.safetensors"),
    "a header of nothing": (_weights_of(bytes(8)), ValueError, "Truncated or damaged: model.safetensors"),
    "a header beyond the file": (
        _weights_of((99).to_bytes(8, "little") + b"{}"),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "offsets beyond the file": (
        _weights_of(_header(x=dict(dtype="F32", shape=[4], data_offsets=[0, 16]))),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "offsets of another shape": (
        _weights_of(_header(x=dict(dtype="F32", shape=[2], data_offsets=[0, 12]))),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "overlapping offsets": (
        _weights_of(_header(**{x: dict(dtype="F32", shape=[3], data_offsets=[0, 12]) for x in "ab"})),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "index: not JSON": (_index_of(b"{"), ValueError, "model.safetensors.index.json' is not JSON"),
    "index: no weight_map": (_index_of(b"{}"), ValueError, "index.json' has a weight_map, from the names of tensors"),
    "index: numbers": (_index_of(b'{"weight_map": {"x": 1}}'), ValueError, "has a weight_map, from the names"),
    "index: parent": (_elsewhere("../two.safetensors"), ValueError, "in its own folder: '../two.safetensors' in"),
    "index: root": (_elsewhere("{}/two.safetensors"), ValueError, "An index names files in its own folder: '/"),
    "index: through a link": (_elsewhere("folder/two.safetensors"), ValueError, "in its own folder: 'folder/two"),
    "index: a link": (_elsewhere("link.safetensors"), ValueError, "'link.safetensors' in .* is a link to '.*two.safe"),
    "index: a pickle": (
        _index_to_a_pickle,
        ValueError,
        "This index names files that end in '.safetensors': 'pytorch_model.bin' in",
    ),
    "index: what a file lacks": (
        lambda folder: _remapped(folder, lambda places: places.update({Q_PROJ: "two.safetensors"})),
        ValueError,
        r"are not of one model: 1 tensors are not in the file of its weight_map, such as .*q_proj.weight': 'two",
    ),
    "index: what it does not name": (
        lambda folder: _remapped(folder, lambda places: places.pop(Q_PROJ)),
        ValueError,
        r"are not of one model: 1 tensors are not in its weight_map, such as .*q_proj.weight': 'one.safetensors'",
    ),
    "no safetensors": (functools.partial(_without, "safetensors"), ImportError, r"pip install 'mqa-jax\[torch\]'"),
    "no torch": (functools.partial(_without, "torch"), ImportError, r"This needs PyTorch: pip .*'mqa-jax\[torch\]'"),
}
NEEDS_TORCH = {
    "a pickle of more": (_pickle_of_more, ValueError, r"holds more than named tensors: \['epoch'\]"),
    "a pickle: Git LFS": (
        _weights_of(b"version https://git-lfs.github.com/spec/v1", "pytorch_model.bin"),
        ValueError,
        "pytorch_model.bin is damaged, .* but a Git LFS pointer",
    ),
    "a pickle of float8": (
        _pickle_of_float8,
        NotImplementedError,
        "self_attn.q_proj.weight' in '.*pytorch_model.bin' is torch.float8_e4m3fn",
    ),
    "a pickle with code": (_evil, ValueError, "pytorch_model.bin is damaged, or holds more than tensors.*safetensors"),
}


@pytest.mark.parametrize("name", [*WRONG, *(pytest.param(name, marks=pytest.mark.torch) for name in NEEDS_TORCH)])
def test_what_is_said_of_files_that_are_not_right(tmp_path, name):
    make, kind, message = (WRONG | NEEDS_TORCH)[name]
    with pytest.raises(kind, match=message):
        make(tmp_path).attention(0)


def test_a_path_as_text(tmp_path, monkeypatch):
    write(tmp_path, model=layer(0))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for folder in (str(tmp_path), f"~/{tmp_path.name}"):
        assert Checkpoint(folder).path == tmp_path
        Checkpoint(folder).attention(0)


def test_frequencies_in_old_files(tmp_path):
    plain = write(tmp_path, model=layer(0)).attention(0)[1]
    for dtype in (jnp.float32, jnp.bfloat16):
        _, variables = _rotary(tmp_path, jnp.array([1.0, 0.01], dtype)).attention(0)
        jax.tree.map(np.testing.assert_array_equal, variables, plain)


def test_float64_stays_float64(tmp_path):
    """JAX itself would make float32 of it, where jax_enable_x64 is off."""
    from safetensors.numpy import save_file

    precise = {name: np.asarray(x, np.float64) + 1e-12 for name, x in layer(0).items()}
    checkpoint = write(tmp_path, model=layer(0))
    save_file(precise, tmp_path / "model.safetensors")
    _, variables = checkpoint.attention(0)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(variables["params"]["query"]["kernel"].reshape(24, 24).T, precise[Q_PROJ])


def test_the_index_decides_which_file_holds_a_tensor(tmp_path):
    other = {Q_PROJ: layer(0)[Q_PROJ] + 1}
    checkpoint = write(tmp_path, one=layer(0), two=layer(1) | other)  # the index that is written names the last
    np.testing.assert_array_equal(checkpoint.tensors(Q_PROJ)[""], other[Q_PROJ])
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q_PROJ] = "one.safetensors"
    path.write_text(json.dumps(index))
    np.testing.assert_array_equal(checkpoint.tensors(Q_PROJ)[""], layer(0)[Q_PROJ])


def test_files_that_no_index_names_are_not_read(tmp_path):
    checkpoint = write(tmp_path, one=layer(0), two=layer(1))
    (tmp_path / "three.safetensors").write_bytes(b"whatever")
    assert len(checkpoint.files) == 8


def test_one_file_comes_before_an_index_as_in_transformers(tmp_path):
    checkpoint = write(tmp_path, one=layer(0), two=layer(1))
    save_file(layer(0), tmp_path / "model.safetensors")
    assert {path.name for path in checkpoint.files.values()} == {"model.safetensors"}


def test_the_cache_of_huggingface_hub_is_made_of_links(tmp_path):
    snapshot, blobs = tmp_path / "snapshots/1234", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    checkpoint = write(snapshot, one=layer(0), two=layer(1))
    for path in list(snapshot.iterdir()):
        blob = path.rename(blobs / f"hash_of_{path.name}")
        path.symlink_to(f"../../blobs/{blob.name}")
    checkpoint.attention(1)


def test_files_that_are_replaced_are_read_anew(tmp_path):
    checkpoint = write(tmp_path, model=layer(0))
    before = checkpoint.attention(0)[1]
    write(tmp_path, CONFIG | dict(num_hidden_layers=3), model={name: x + 1 for name, x in layer(0).items()} | layer(2))
    after = checkpoint.attention(0)[1]
    assert checkpoint.layers == 3
    assert len(checkpoint.files) == 8
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x + 1, y), before, after)


@pytest.mark.torch
def test_a_pickle_that_is_replaced_is_read_anew(tmp_path):
    import torch

    checkpoint = _no_weights(tmp_path)
    for value in (1.0, 2.0):
        torch.save({"x": torch.full((3,), value)}, tmp_path / "new.bin")
        (tmp_path / "new.bin").replace(tmp_path / "pytorch_model.bin")
        np.testing.assert_array_equal(checkpoint.tensors("x")[""], np.full(3, value))


@pytest.mark.torch
def test_a_pickle_of_tensors_alone(tmp_path):
    import torch

    checkpoint = _no_weights(tmp_path)
    state = {name: torch.tensor(np.asarray(x, np.float32)).bfloat16() for name, x in layer(0).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    _, variables = checkpoint.attention(0)
    (tmp_path / "expected").mkdir()
    expected = write(tmp_path / "expected", model=layer(0)).attention(0)[1]
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
