"""The model of `small_model` as a GGUF file, with whatever settings and tensors a case wants."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import small_model
from safetensors.numpy import load_file

from mqa_jax.torch_interop import halves_to_interleaved

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SIZES: dict[str, Any] = {
    "block_count": 2,
    "context_length": 256,
    "embedding_length": 48,
    "feed_forward_length": 64,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 8,
    "rope.freq_base": 1000.0,
    "vocab_size": 300,
}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Of a folder, under GGUF's names, queries and keys in GGUF's order."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, x in load_file(path).items():
            if name in WHOLE:
                found[WHOLE[name]] = x
                continue
            _, _, layer, *rest, kind = name.split(".")
            part = PARTS[".".join(rest)]
            heads = {"attn_q": 6, "attn_k": 2}.get(part)
            found[f"blk.{layer}.{part}.{kind}"] = x if heads is None else halves_to_interleaved(x, heads)
    return found


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    settings: dict[str, Any] | None = None,
    architecture: str = "llama",
    types: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A file of these tensors, some of them quantised.

    `settings`: names with "llama." left out, or beginning with "/" whole; a value of None is none.
    """
    types = types or {}
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in (SIZES | (settings or {})).items():
        key = name[1:] if name.startswith("/") else f"llama.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, x in tensors.items():
        if name in types:
            writer.add_tensor(name, gguf.quants.quantize(x, types[name]), raw_dtype=types[name])
        else:
            writer.add_tensor(name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(folder: Path) -> dict[str, np.ndarray]:
    """Tensors of `small_model`, in a folder that is written for it."""
    return tensors(small_model.write(folder))
