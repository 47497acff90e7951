"""Whole models out of GGUF files: what is in them and not understood is refused, never skipped."""

from typing import Any

import gguf
import numpy as np
import pytest
import small_gguf
from checkpoints import load_checkpoint
from small_files import PLAIN, also, logits, of_transformers, without

import mqa_jax


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Tensors of a GGUF file."""
    return small_gguf.small(tmp_path_factory.mktemp("small"))


YARN = dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=64)
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of a GGUF file, and of a folder
    "plain": ({}, dict(rope_parameters=PLAIN)),
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        dict(rope_parameters=PLAIN | dict(rope_type="linear", factor=4.0)),
    ),
    "linear unsaid": (
        {"rope.scaling.factor": 4.0},
        dict(rope_parameters=PLAIN | dict(rope_type="linear", factor=4.0)),
    ),
    "linear of old": ({"rope.scale_linear": 4.0}, dict(rope_parameters=PLAIN | dict(rope_type="linear", factor=4.0))),
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 1.0}, dict(rope_parameters=PLAIN)),
    "yarn": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.finetuned": True,
        },
        dict(rope_parameters=YARN),
    ),
    "yarn in detail": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": 0.5,
            "rope.scaling.yarn_ext_factor": 1.0,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
        },
        dict(
            rope_parameters=YARN | dict(beta_fast=16.0, beta_slow=2.0, attention_factor=0.5 * (1 + 0.1 * np.log(4.0)))
        ),
    ),
    "window": ({"attention.sliding_window": 7}, dict(model_type="mistral", sliding_window=7, rope_parameters=PLAIN)),
    "no window": ({"attention.sliding_window": 0}, dict(rope_parameters=PLAIN)),
    "what changes nothing": (
        {"expert_count": 0, "attention.causal": True, "logit_scale": 1.0, "/general.description": "a small one"},
        dict(rope_parameters=PLAIN),
    ),
    "each layer the same": (
        {"attention.head_count_kv": [2, 2], "feed_forward_length": [64, 64]},
        dict(rope_parameters=PLAIN),
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", SAME)
def test_a_gguf_file_is_the_folder_that_says_the_same(tmp_path, small, name):
    said, settings = SAME[name]
    biases = dict(attention_bias=False, mlp_bias=False) if settings.get("model_type") == "mistral" else {}
    tensors = {key: x for key, x in small.items() if not (biases and key.endswith("bias"))}
    expected = of_transformers(tmp_path, settings | biases)
    np.testing.assert_allclose(logits(small_gguf.write(tmp_path / "x.gguf", tensors, said)), expected, atol=1e-4)
    changes = [setting for setting in said if "scal" in setting or "window" in setting]
    if "logit_scale" not in said and "none" not in name and "no window" not in name and changes:
        other = logits(small_gguf.write(tmp_path / "y.gguf", tensors))
        assert np.abs(other - expected).max() > 1e-3, "a test that cannot fail"


def test_a_table_of_factors_is_llama3_scaling(tmp_path, small):
    """As llama.cpp converts it."""
    scaling = mqa_jax.Llama3Scaling(original_max_position_embeddings=64)
    plain = mqa_jax.Rope(theta=1000.0)
    factors = plain.frequencies(8) / mqa_jax.Rope(theta=1000.0, scaling=scaling).frequencies(8)
    path = small_gguf.write(tmp_path / "x.gguf", small | {"rope_freqs.weight": factors.astype(np.float32)})
    rope = load_checkpoint(path).config.rope
    assert rope is not None
    np.testing.assert_allclose(rope.frequencies(8), plain.frequencies(8) / factors, rtol=1e-6)
    assert np.abs(logits(path) - logits(small_gguf.write(tmp_path / "y.gguf", small))).max() > 1e-3


@pytest.mark.parametrize(
    "kinds", [("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up", "ffn_down")]
)
def test_biases_of_a_gguf_file_are_used(tmp_path, small, kinds):
    bias = lambda name: name.endswith(".bias")
    weights = {name: x for name, x in small.items() if not bias(name)}
    chosen = {name: x for name, x in small.items() if bias(name) and name.split(".")[2] in kinds}
    both = logits(small_gguf.write(tmp_path / "x.gguf", weights | chosen))
    zero = {name: np.zeros_like(x) for name, x in small.items() if bias(name)}
    np.testing.assert_allclose(both, logits(small_gguf.write(tmp_path / "y.gguf", weights | zero | chosen)), atol=1e-5)
    assert np.abs(both - logits(small_gguf.write(tmp_path / "z.gguf", weights))).max() > 0.1


REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {  # settings, change of tensors, message
    "longrope": (
        {"rope.scaling.type": "longrope"},
        None,
        "This scaling of RoPE is not supported: .*'longrope'.* x.gguf|in",
    ),
    "none with a factor": (
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        None,
        r"This scaling of RoPE is not supported: {'rope.scaling.type': 'none', 'rope.scaling.factor': 4.0}",
    ),
    "linear with a magnitude": (
        {"rope.scaling.attn_factor": 2.0},
        None,
        "This scaling of RoPE .*'rope.scaling.attn_factor': 2",
    ),
    "half of yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5},
        None,
        "This scaling of RoPE .*yarn_ext_factor': 0.5",
    ),
    "DeepSeek's": (
        {"rope.scaling.yarn_log_multiplier": 0.1},
        None,
        "Unsupported settings: {'llama.rope.scaling.yarn_log_multiplier'",
    ),
    "two scalings": (
        {"rope.scaling.factor": 2.0},
        also("rope_freqs.weight", (4,)),
        "This scaling of RoPE .* and rope_freqs",
    ),
    "a short table": (
        {},
        also("rope_freqs.weight", (3,)),
        "one factor for each pair of features: 3 factors, head_dim=8",
    ),
    "part of a head": ({"rope.dimension_count": 4}, None, "Only llama.rope.dimension_count = features of a head, 8"),
    "values of another size": ({"attention.value_length": 4}, None, "Only llama.attention.value_length = features"),
    "experts": (
        {"expert_count": 8, "expert_used_count": 2},
        None,
        "{'llama.expert_count': 8, 'llama.expert_used_count'",
    ),
    "not causal": ({"attention.causal": False}, None, "{'llama.attention.causal': False} in"),
    "scale": ({"attention.scale": 0.5}, None, "{'llama.attention.scale': 0.5} in"),
    "logit scale": ({"logit_scale": 0.5}, None, "{'llama.logit_scale': 0.5} in"),
    "soft cap": ({"final_logit_softcapping": 30.0}, None, "{'llama.final_logit_softcapping': 30.0} in"),
    "a window of no size": ({"attention.sliding_window": -1}, None, "A window has a size: .*sliding_window=-1"),
    "windows of some layers": (
        {"attention.sliding_window_pattern": 6},
        None,
        "{'llama.attention.sliding_window_pattern'",
    ),
    "a setting of the future": ({"attention.something": "new"}, None, "{'llama.attention.something': 'new'} in"),
    "layers that differ": (
        {"attention.head_count_kv": [2, 1]},
        None,
        r"Layers that differ are not supported: llama.attention.head_count_kv=\[2, 1\]",
    ),
    "no heads": ({"attention.head_count": None}, None, "There is no llama.attention.head_count in '.*x.gguf'"),
    "zero heads": ({"attention.head_count": 0}, None, "A size is positive: llama.attention.head_count=0 in"),
    "no epsilon": (
        {"attention.layer_norm_rms_epsilon": None},
        None,
        "There is no llama.attention.layer_norm_rms_epsilon",
    ),
    "a size that is text": ({"block_count": "2"}, None, "The type must be int: llama.block_count='2'"),
    "another vocabulary": ({"vocab_size": 299}, None, "llama.vocab_size is not the 300 rows of token_embd.weight"),
    "too wide": (
        {"feed_forward_length": 65},
        None,
        r"shapes of tensors do not fit the settings.*mlp/down.* is \(64, 48\), by",
    ),
    "more layers": ({"block_count": 3}, None, "Tensors are missing in .*: blk.2.attn_q.weight, blk.2.attn_q.bias"),
    "fewer layers": (
        {"block_count": 1},
        None,
        "Tensors that this model does not use, .*: blk.1.attn_k.bias, .* and 12 m",
    ),
    "no embeddings": ({}, without("token_embd"), "Tensors are missing in .*: token_embd.weight"),
    "no norm": ({}, without("output_norm"), "Tensors are missing in .*: output_norm.weight"),
    "one bias": ({}, without("blk.1.attn_k.bias"), "Tensors are missing in .*: blk.1.attn_k.bias"),
    "a bias of one layer": ({}, without("blk.0.attn_output.bias"), "does not use, .*: blk.1.attn_output.bias"),
    "a tensor of its own": ({}, also("blk.0.attn_q_norm.weight"), "does not use, .*: blk.0.attn_q_norm.weight"),
    "a router": ({}, also("blk.0.ffn_gate_inp.weight"), "does not use, .*: blk.0.ffn_gate_inp.weight"),
    "integers": (
        {},
        lambda tensors: tensors | {"output_norm.weight": np.ones(48, np.int8)},
        "Tensors of this type are not supported: output_norm.weight in .* is I8",
    ),
    "an adapter": ({"/general.type": "adapter"}, None, "Only llama models: .*, general.type='adapter'"),
    "an adapter of old": ({"/adapter.type": "lora"}, None, "Only llama models: .*, general.type='adapter'"),
    "a part": ({"/split.count": 3}, None, "This is one of split.count=3 files: .*llama-gguf-split --merge"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_gguf_file_that_is_not_understood(tmp_path, small, name):
    settings, change, message = REFUSED[name]
    path = small_gguf.write(tmp_path / "x.gguf", change(small) if change else small, settings)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        load_checkpoint(path)


def test_a_gguf_file_of_another_architecture(tmp_path, small):
    path = small_gguf.write(tmp_path / "x.gguf", small, architecture="qwen3")
    with pytest.raises(NotImplementedError, match=r"Only llama models: general.architecture='qwen3'"):
        load_checkpoint(path)


DAMAGED = {
    "cut in its tensors": lambda data: data[:-100],
    "cut in its header": lambda data: data[:200],
    "cut after its magic": lambda data: data[:4],
    "endless": lambda data: data[:16] + (2**62).to_bytes(8, "little") + data[24:],
    "of version 1": lambda data: data[:4] + (1).to_bytes(4, "little") + data[8:],
    "of version 99": lambda data: data[:4] + (99).to_bytes(4, "little") + data[8:],
    "of other magic": lambda data: b"GGML" + data[4:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_gguf_file_that_is_damaged(tmp_path, small, name):
    path = small_gguf.write(tmp_path / "x.gguf", small)
    path.write_bytes(DAMAGED[name](path.read_bytes()))
    with pytest.raises(ValueError, match=r"Truncated, damaged, or not GGUF of version 2 or 3: '.*x.gguf' \(.*\)"):
        load_checkpoint(path)


def test_a_gguf_file_with_an_endless_array(tmp_path, small):
    path = small_gguf.write(tmp_path / "x.gguf", small, {"/general.tags": [7, 7, 7]})
    data = path.read_bytes()
    where = data.index(b"general.tags") + len("general.tags") + 8  # after the types of the field and of its items
    path.write_bytes(data[:where] + (2**40).to_bytes(8, "little") + data[where + 8 :])
    with pytest.raises(ValueError, match=r"x.gguf' \(it ends at byte .*, before the end of its contents\)"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"<html>", "a web page"),
    ],
)
def test_something_else_in_the_place_of_a_gguf_file(tmp_path, data, what):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=f"This is not a GGUF file: '.*x.gguf' is {what}"):
        load_checkpoint(tmp_path / "x.gguf")


def test_a_gguf_file_by_another_name(tmp_path, small):
    load_checkpoint(str(small_gguf.write(tmp_path / "sha256-1234", small)))
    with pytest.raises(ValueError, match=r"path='.*absent', which does not exist"):
        load_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_tensors(tmp_path, small, kind):
    kind = gguf.GGMLQuantizationType[kind]
    types = {name: kind for name, x in small.items() if x.shape[-1] % 32 == 0 and x.ndim == 2}  # a block is 32 numbers
    near = small | {name: gguf.quants.dequantize(gguf.quants.quantize(small[name], kind), kind) for name in types}
    path = small_gguf.write(tmp_path / "x.gguf", small, types=types)
    np.testing.assert_array_equal(logits(path), logits(small_gguf.write(tmp_path / "y.gguf", near)))
    assert np.abs(logits(path) - logits(small_gguf.write(tmp_path / "z.gguf", small))).max() > 0
