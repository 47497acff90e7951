"""Checkpoints of which one thing is not right."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from small_checkpoints import CONFIG, layer, write

from mqa_jax.torch_interop.hugging_face.checkpoint import Checkpoint


def truncated(folder: Path) -> Checkpoint:
    checkpoint = write(folder, model=layer(0))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return checkpoint


def no_shard(folder: Path) -> Checkpoint:
    checkpoint = write(folder, one=layer(0), two=layer(1))
    (folder / "two.safetensors").unlink()
    return checkpoint


def no_weights(folder: Path) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return Checkpoint(folder)


def half(folder: Path) -> Checkpoint:
    return write(folder, model={name: x for name, x in layer(0).items() if "v_proj" not in name})


def without(package: str, folder: Path) -> Any:
    """Where it is not installed."""
    checkpoint = write(folder, model=layer(0))
    if package == "torch":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with mock.patch.dict(sys.modules, {package: None}):
        return checkpoint.attention(0)


def evil(folder: Path) -> Checkpoint:
    """A pickle that would run code."""
    checkpoint = no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    return checkpoint


def with_settings(folder: Path, **settings: Any) -> Checkpoint:
    """Other settings; those that are None are left out."""
    merged = {name: x for name, x in {**CONFIG, **settings}.items() if x is not None}
    return write(folder, merged, model=layer(0) | layer(1))


def config_of(text: bytes) -> Any:
    def make(folder: Path) -> Checkpoint:
        checkpoint = write(folder, model=layer(0))
        (folder / "config.json").write_bytes(text)
        return checkpoint

    return make


def weights_of(data: bytes, name: str = "model.safetensors") -> Any:
    def make(folder: Path) -> Checkpoint:
        checkpoint = no_weights(folder)
        (folder / name).write_bytes(data)
        return checkpoint

    return make


def index_of(text: bytes) -> Any:
    def make(folder: Path) -> Checkpoint:
        checkpoint = write(folder, one=layer(0), two=layer(1))
        (folder / "model.safetensors.index.json").write_bytes(text)
        return checkpoint

    return make


def header(**tensors: Any) -> bytes:
    """Of a safetensors file of 12 bytes of data."""
    header = json.dumps(tensors).encode()
    return len(header).to_bytes(8, "little") + header + bytes(12)


def elsewhere(name: str) -> Any:
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


def pickle_of_more(folder: Path) -> Checkpoint:
    import torch

    torch.save({"weight": torch.ones(2), "epoch": 3}, folder / "pytorch_model.bin")
    return no_weights(folder)


def pickle_of_float8(folder: Path) -> Checkpoint:
    import torch

    torch.save({Q_PROJ: torch.ones(2).to(torch.float8_e4m3fn)}, folder / "pytorch_model.bin")
    return no_weights(folder)


def index_to_a_pickle(folder: Path) -> Checkpoint:
    checkpoint = evil(folder)
    index = {"weight_map": dict.fromkeys(layer(0), "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return checkpoint


def remapped(folder: Path, change: Any) -> Checkpoint:
    """Two files whose index somebody has edited."""
    checkpoint = write(folder, one=layer(0), two=layer(1))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    return checkpoint


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def quantized(folder: Path, dtype: Any, **more: jax.Array) -> Checkpoint:
    tensors = layer(0)
    return write(folder, model=tensors | {Q_PROJ: tensors[Q_PROJ].astype(dtype), **more})


class Third(Checkpoint):
    """Whatever layer is asked for."""

    def attention(self, layer: int) -> Any:
        return super().attention(2)


def one_of_three(folder: Path) -> Checkpoint:
    """There are tensors of a layer that the config does not have."""
    return Third(write(folder, model=layer(1) | layer(2)).folder)


def adapter(folder: Path) -> Checkpoint:
    (folder / "adapter_config.json").write_text("{}")
    return write(folder, model=layer(0))


def rotary(folder: Path, frequencies: jax.Array) -> Checkpoint:
    return write(folder, model=layer(0) | {"model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})


def other_biases(*features: int) -> dict[str, jax.Array]:
    names = zip(("k_proj", "v_proj", "o_proj"), (features[1], features[1], features[0]))
    return {f"model.layers.0.self_attn.{name}.bias": jnp.ones(n) for name, n in names}
