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

from mqa_jax import hf_checkpoint
from mqa_jax.hf_checkpoint import Checkpoint

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
    really = hf_checkpoint._open

    def spy(path):
        opened.append(path.name)
        return really(path)

    monkeypatch.setattr(hf_checkpoint, "_open", spy)
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
    "no safetensors": (functools.partial(_without, "safetensors"), ImportError, r"pip install 'mqa-jax\[torch\]'"),
    "no torch": (functools.partial(_without, "torch"), ImportError, r"This wants PyTorch: pip .*'mqa-jax\[torch\]'"),
}
NEEDS_TORCH = {
    "a pickle with code": (_evil, ValueError, "pytorch_model.bin is damaged, or holds more than tensors.*safetensors"),
}


@pytest.mark.parametrize("name", [*WRONG, *(pytest.param(name, marks=pytest.mark.torch) for name in NEEDS_TORCH)])
def test_what_is_said_of_files_that_are_not_right(tmp_path, name):
    make, kind, message = (WRONG | NEEDS_TORCH)[name]
    with pytest.raises(kind, match=message):
        make(tmp_path).attention(0)


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
