"""Checkpoints on disk: which tensors are read, and in which dtype."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file
from small_checkpoints import CONFIG, layer, write
from wrong_checkpoints import Q_PROJ, no_weights

from mqa_jax.torch_interop.hugging_face import weight_files


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

    checkpoint = no_weights(tmp_path)
    for value in (1.0, 2.0):
        torch.save({"x": torch.full((3,), value)}, tmp_path / "new.bin")
        (tmp_path / "new.bin").replace(tmp_path / "pytorch_model.bin")
        np.testing.assert_array_equal(checkpoint.tensors("x")[""], np.full(3, value))


@pytest.mark.torch
def test_a_pickle_of_tensors_alone(tmp_path):
    import torch

    checkpoint = no_weights(tmp_path)
    state = {name: torch.tensor(np.asarray(x, np.float32)).bfloat16() for name, x in layer(0).items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    _, variables = checkpoint.attention(0)
    (tmp_path / "expected").mkdir()
    expected = write(tmp_path / "expected", model=layer(0)).attention(0)[1]
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
