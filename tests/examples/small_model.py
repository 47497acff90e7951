"""A Llama of random weights as a Hugging Face folder, small enough for any test."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SMALL = dict(
    model_type="llama",
    vocab_size=300,
    num_hidden_layers=2,
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    attention_bias=True,
    mlp_bias=True,
    eos_token_id=299,
    rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
)


def _tensors(settings):
    """Random weights under Hugging Face's names."""
    rng = np.random.default_rng(0)
    dim, hidden, head_dim = settings["hidden_size"], settings["intermediate_size"], 8
    kv = settings["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": (settings["vocab_size"], dim), "model.norm.weight": (dim,)}
    shapes["lm_head.weight"] = settings["vocab_size"], dim
    for i in range(settings["num_hidden_layers"]):
        layer = {"q_proj": (dim, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, dim)}
        mlp = {"gate_proj": (hidden, dim), "up_proj": (hidden, dim), "down_proj": (dim, hidden)}
        for part, linears in (("self_attn", layer), ("mlp", mlp)):
            for name, shape in linears.items():
                shapes[f"model.layers.{i}.{part}.{name}.weight"] = shape
                shapes[f"model.layers.{i}.{part}.{name}.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{name}.weight"] = (dim,)
    return {name: rng.standard_normal(shape).astype(np.float32) / 6 for name, shape in shapes.items()}


def write(path: Path) -> Path:
    """config.json, two shards of safetensors, tokenizer.json with bytes alone."""
    (path / "config.json").write_text(json.dumps(SMALL))
    tensors = _tensors(SMALL)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return path
