"""What is said of files of a checkpoint that are not right."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import CONFIG, layer, write
from wrong_checkpoints import (
    Q_PROJ,
    adapter,
    config_of,
    elsewhere,
    evil,
    half,
    header,
    index_of,
    index_to_a_pickle,
    no_shard,
    no_weights,
    one_of_three,
    other_biases,
    pickle_of_float8,
    pickle_of_more,
    quantized,
    remapped,
    rotary,
    truncated,
    weights_of,
    with_settings,
    without,
)

from mqa_jax.torch_interop.hugging_face.checkpoint import Checkpoint

WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "no config": (Checkpoint, FileNotFoundError, "A checkpoint has a config.json: there is none in"),
    "no weights": (no_weights, FileNotFoundError, "There are no weights in .*: model.safetensors, pytorch_model.bin"),
    "no shard": (no_shard, FileNotFoundError, r"names files that are not in .*: \['two.safetensors'\]"),
    "truncated": (truncated, ValueError, r"Truncated or damaged: model.safetensors \(.*\). Fetch the file again"),
    "half a layer": (half, ValueError, "missing: v_proj.weight. Found"),
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
    "a layer beyond the last": (one_of_three, ValueError, "There is no layer 2 in .*: they are 0 to 1"),
    "config: not JSON": (config_of(b"{'model_type': 'llama'}"), ValueError, r"config.json' is not JSON: Expecting"),
    "config: empty": (config_of(b""), ValueError, "config.json' is not JSON, but an empty file"),
    "config: not text": (config_of(b"\xff\xfe{}"), ValueError, "config.json' is not JSON: 'utf-8' codec"),
    "config: a web page": (config_of(b"<!DOCTYPE html>"), ValueError, "config.json' is not JSON, but a web page"),
    "config: a list": (config_of(b"[]"), ValueError, "config.json' holds a JSON object, not a list"),
    "config: no model_type": (
        lambda folder: with_settings(folder, model_type=None),
        ValueError,
        "There is no 'model_type' in",
    ),
    "config: model_type": (
        lambda folder: with_settings(folder, model_type=1),
        ValueError,
        "A model_type is a name: model_type=1",
    ),
    "config: no heads": (
        lambda folder: with_settings(folder, num_attention_heads=None),
        ValueError,
        "'num_attention_heads'",
    ),
    "config: no layers": (
        lambda folder: with_settings(folder, num_hidden_layers=None),
        ValueError,
        r"One of \('num_hidden_layers', 'n_layer', 'n_layers'\) is the number of layers: {}",
    ),
    "config: two numbers of layers": (lambda folder: with_settings(folder, n_layer=3), ValueError, "'n_layer': 3} in"),
    "config: layers": (
        lambda folder: with_settings(folder, num_hidden_layers="2"),
        ValueError,
        "The number of layers is a positive integer: {'num_hidden_layers': '2'}",
    ),
    "quantization_config": (
        lambda folder: with_settings(folder, quantization_config=dict(quant_method="gptq", bits=4)),
        NotImplementedError,
        "Quantised weights are not supported: quantization_config with quant_method='gptq'",
    ),
    "compression_config": (
        lambda folder: with_settings(folder, compression_config=dict(format="pack-quantized")),
        NotImplementedError,
        "compression_config with quant_method={'format'",
    ),
    "float8": (
        lambda folder: quantized(folder, jnp.float8_e4m3fn),
        NotImplementedError,
        "'model.layers.0.self_attn.q_proj.weight' in '.*model.safetensors' is F8_E4M3. Dequantise",
    ),
    "integers": (
        lambda folder: quantized(folder, jnp.int8),
        NotImplementedError,
        "Quantised weights are not read, .*int8.*Dequantise them first",
    ),
    "biases that the config denies": (
        lambda folder: write(
            folder, model=layer(0) | {Q_PROJ.replace("weight", "bias"): jnp.ones(24), **other_biases(24, 8)}
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
        lambda folder: quantized(folder, jnp.int8, **{f"{Q_PROJ}_scale": jnp.ones(1)}),
        NotImplementedError,
        "Quantised weights are not read, .*int8.*with their scales",
    ),
    "an adapter": (adapter, NotImplementedError, "There is an adapter_config.json in .* Merge it"),
    "other frequencies": (
        lambda folder: rotary(folder, jnp.array([1.0, 0.5])),
        NotImplementedError,
        "model.layers.0.self_attn.rotary_emb.inv_freq has other frequencies than those of config.json",
    ),
    "empty": (weights_of(b""), ValueError, r"Truncated or damaged: model.safetensors \(.*\), but an empty file"),
    "Git LFS": (
        weights_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        ValueError,
        r"model.safetensors \(.*\), but a Git LFS pointer, which `git lfs pull` replaces",
    ),
    "a web page": (weights_of(b"\n<html>Not found"), ValueError, r"model.safetensors \(.*\), but a web page"),
    "a zip archive": (
        weights_of(b"PK\x03\x04" + bytes(30)),
        ValueError,
        r"model.safetensors \(.*\), but a zip archive",
    ),
    "GGUF": (weights_of(b"GGUF" + bytes(30)), ValueError, r"model.safetensors \(.*\), but a GGUF file"),
    "a header of exabytes": (weights_of(b"\xff" * 8 + b"{}"), ValueError, "Truncated or damaged: model.safetensors"),
    "a header of nothing": (weights_of(bytes(8)), ValueError, "Truncated or damaged: model.safetensors"),
    "a header beyond the file": (
        weights_of((99).to_bytes(8, "little") + b"{}"),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "offsets beyond the file": (
        weights_of(header(x=dict(dtype="F32", shape=[4], data_offsets=[0, 16]))),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "offsets of another shape": (
        weights_of(header(x=dict(dtype="F32", shape=[2], data_offsets=[0, 12]))),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "overlapping offsets": (
        weights_of(header(**{x: dict(dtype="F32", shape=[3], data_offsets=[0, 12]) for x in "ab"})),
        ValueError,
        "Truncated or damaged: model.safetensors",
    ),
    "index: not JSON": (index_of(b"{"), ValueError, "model.safetensors.index.json' is not JSON"),
    "index: no weight_map": (index_of(b"{}"), ValueError, "index.json' has a weight_map, from the names of tensors"),
    "index: numbers": (index_of(b'{"weight_map": {"x": 1}}'), ValueError, "has a weight_map, from the names"),
    "index: parent": (elsewhere("../two.safetensors"), ValueError, "in its own folder: '../two.safetensors' in"),
    "index: root": (elsewhere("{}/two.safetensors"), ValueError, "An index names files in its own folder: '/"),
    "index: through a link": (elsewhere("folder/two.safetensors"), ValueError, "in its own folder: 'folder/two"),
    "index: a link": (elsewhere("link.safetensors"), ValueError, "'link.safetensors' in .* is a link to '.*two.safe"),
    "index: a pickle": (
        index_to_a_pickle,
        ValueError,
        "This index names files that end in '.safetensors': 'pytorch_model.bin' in",
    ),
    "index: what a file lacks": (
        lambda folder: remapped(folder, lambda places: places.update({Q_PROJ: "two.safetensors"})),
        ValueError,
        r"are not of one model: 1 tensors are not in the file of its weight_map, such as .*q_proj.weight': 'two",
    ),
    "index: what it does not name": (
        lambda folder: remapped(folder, lambda places: places.pop(Q_PROJ)),
        ValueError,
        r"are not of one model: 1 tensors are not in its weight_map, such as .*q_proj.weight': 'one.safetensors'",
    ),
    "no safetensors": (functools.partial(without, "safetensors"), ImportError, r"pip install 'mqa-jax\[torch\]'"),
    "no torch": (functools.partial(without, "torch"), ImportError, r"This needs PyTorch: pip .*'mqa-jax\[torch\]'"),
}
NEEDS_TORCH = {
    "a pickle of more": (pickle_of_more, ValueError, r"holds more than named tensors: \['epoch'\]"),
    "a pickle: Git LFS": (
        weights_of(b"version https://git-lfs.github.com/spec/v1", "pytorch_model.bin"),
        ValueError,
        "pytorch_model.bin is damaged, .* but a Git LFS pointer",
    ),
    "a pickle of float8": (
        pickle_of_float8,
        NotImplementedError,
        "self_attn.q_proj.weight' in '.*pytorch_model.bin' is torch.float8_e4m3fn",
    ),
    "a pickle with code": (evil, ValueError, "pytorch_model.bin is damaged, or holds more than tensors.*safetensors"),
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
        _, variables = rotary(tmp_path, jnp.array([1.0, 0.01], dtype)).attention(0)
        jax.tree.map(np.testing.assert_array_equal, variables, plain)
