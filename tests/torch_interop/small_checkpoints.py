"""Small checkpoints of Llama's attention."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.flax import save_file

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
