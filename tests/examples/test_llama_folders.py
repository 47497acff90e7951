"""Whole models out of Hugging Face folders: what is in them and not understood is refused, never skipped."""

import json
import re
from typing import Any

import numpy as np
import pytest
import small_model
from checkpoints import check_settings, load_checkpoint
from safetensors.numpy import load_file
from small_files import PLAIN, also, folder_with, logits, of_transformers, without

from mqa_jax.torch_interop.hugging_face.checkpoint import Config


def plain(tensors):
    return {name: x for name, x in tensors.items() if not name.endswith("bias")}


def with_query_biases(tensors):
    """Those of queries, keys and values, which Qwen2 has."""
    return {name: x for name, x in tensors.items() if not re.search("(o_proj|mlp.*)[.]bias", name)}


FOLDERS: dict[str, tuple[dict[str, Any], Any]] = {
    "llama": ({}, lambda x: x),
    "mistral": (dict(model_type="mistral", sliding_window=9, attention_bias=False, mlp_bias=False), plain),
    "mistral without a window": (
        dict(model_type="mistral", sliding_window=None, attention_bias=None, mlp_bias=None),
        plain,
    ),
    "qwen2": (dict(model_type="qwen2", attention_bias=None, mlp_bias=None), with_query_biases),
    "qwen2 with windows": (
        dict(
            model_type="qwen2",
            attention_bias=None,
            mlp_bias=None,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=0,
        ),
        with_query_biases,
    ),
    "tied": (dict(tie_word_embeddings=True), without("lm_head")),
    "tied and said twice": (
        dict(tie_word_embeddings=True),
        lambda x: x | {"lm_head.weight": x["model.embed_tokens.weight"]},
    ),
    "old frequencies": (
        dict(rope_parameters=PLAIN),
        lambda x: (
            x | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": 1000.0 ** -np.arange(0, 1, 0.25) for i in (0, 1)}
        ),
    ),
}


@pytest.mark.torch
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_what_transformers_reads(tmp_path, name):
    settings, change = FOLDERS[name]
    tensors = change({n: x for p in small_model.write(tmp_path).glob("*.safetensors") for n, x in load_file(p).items()})
    expected = of_transformers(tmp_path, settings, tensors)
    np.testing.assert_allclose(logits(tmp_path), expected, atol=1e-4)


def test_a_model_without_its_head(tmp_path):
    """As `LlamaModel.save_pretrained` writes it: that will do where embeddings are tied."""
    headless = lambda tensors: {
        name.removeprefix("model."): x for name, x in tensors.items() if name != "lm_head.weight"
    }
    got = logits(folder_with(tmp_path, headless, tie_word_embeddings=True))
    (tmp_path / "model.safetensors").unlink()
    np.testing.assert_array_equal(got, logits(folder_with(tmp_path, without("lm_head"), tie_word_embeddings=True)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"missing in .*: lm_head.weight. .* Without lm_head.weight the embeddings must be"
    ):
        load_checkpoint(folder_with(tmp_path, headless))


NOT_UNDERSTOOD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "activation": (dict(hidden_act="gelu"), None, r"{'hidden_act': 'gelu'} in .*config.json'. Supported are .*'silu'"),
    "not causal": (dict(is_causal=False), None, "{'is_causal': False} in"),
    "part of a head": (dict(partial_rotary_factor=0.5), None, "{'partial_rotary_factor': 0.5} in"),
    "Llama's window": (dict(sliding_window=8), None, "{'sliding_window': 8} in"),
    "code of its own": (dict(auto_map={"AutoModelForCausalLM": "x.Y"}), None, "{'auto_map': "),
    "a multiplier": (dict(logits_scaling=8.0), None, "{'logits_scaling': 8.0} in"),
    "quantised": (dict(quantization_config=dict(quant_method="fp8")), None, "quant_method='fp8'"),
    "Mistral's biases": (
        dict(model_type="mistral", sliding_window=None),
        None,
        "{'attention_bias': True, 'mlp_bias': True} in",
    ),
    "Mistral of unknown window": (
        dict(model_type="mistral", attention_bias=False, mlp_bias=False),
        None,
        "There is no 'sliding_window' in",
    ),
    "Qwen2 with windows in some layers": (
        dict(
            model_type="qwen2",
            attention_bias=False,
            mlp_bias=False,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,
        ),
        with_query_biases,
        r"layer 1 has local_window_size=\(8, 0\) instead of None",
    ),
    "no epsilon": (dict(rms_norm_eps=None), None, "rms_norm_eps"),
    "sizes": (dict(intermediate_size=64.0), None, "A size is a positive integer: intermediate_size=64.0"),
    "another width": (dict(intermediate_size=65), None, r"shapes of tensors do not fit the settings, .*\(64, 48\)"),
    "another vocabulary": (dict(vocab_size=299), None, r"embed/embedding, lm_head/kernel; the first is \(300, 48\)"),
    "a head of its own": (
        dict(tie_word_embeddings=True),
        None,
        "Tied embeddings must be equal: tie_word_embeddings=True, lm_",
    ),
    "no biases": ({}, plain, "missing in .*: model.layers.0.self_attn.q_proj.bias"),
    "biases unsaid": (dict(attention_bias=False), None, "does not use, in .*: model.layers.0.self_attn.k_proj.bias"),
    "a tensor of its own": (
        {},
        also("model.layers.0.self_attn.q_norm.weight"),
        "does not use, .*: model.layers.0.self_attn.q",
    ),
    "a classifier": (
        {},
        lambda x: without("lm_head")(x) | {"score.weight": np.ones((2, 48), np.float32)},
        "missing in .*: lm_head.weight",
    ),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_a_folder_that_is_not_understood(tmp_path, name):
    settings, change, message = NOT_UNDERSTOOD[name]
    folder = folder_with(tmp_path, change or (lambda x: x), **settings)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        load_checkpoint(folder)


def test_settings_of_transformers_are_known(tmp_path):
    """A config.json as older transformers wrote it, with all that it says of generation."""
    more = dict(
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
        transformers_version="4.40.1",
        pretraining_tp=1,
        rope_interleaved=False,
        use_cache=True,
        top_k=50,
        sliding_window=None,
        something_that_is_off=None,
    )
    load_checkpoint(folder_with(tmp_path, **more))


@pytest.mark.torch
def test_defaults_of_transformers_are_known(tmp_path):
    """All that `save_pretrained` may write."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    for kind in (LlamaConfig, MistralConfig, Qwen2Config):
        settings = json.loads(kind().to_json_string(use_diff=False))
        check_settings(Config(settings, tmp_path))
