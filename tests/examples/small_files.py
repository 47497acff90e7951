"""Model files made of `small_model` with other settings and tensors, and what is computed with them."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import small_model
from checkpoints import load_checkpoint
from llama import Llama
from safetensors.numpy import load_file, save_file
from small_model import SMALL

PLAIN = dict(rope_type="default", rope_theta=1000.0)
IDS = np.random.default_rng(0).integers(0, 300, (1, 40))


def logits(path):
    config, params, _ = load_checkpoint(path)
    return np.asarray(Llama(config).apply({"params": params}, jnp.asarray(IDS)))


def rewrite(folder: Path, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A folder of one file."""
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def folder_with(folder: Path, change: Any = lambda tensors: tensors, **settings: Any) -> Path:
    """The small model with other settings, and other tensors."""
    small_model.write(folder)
    tensors = {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
    return rewrite(folder, SMALL | settings, change(tensors))


def of_transformers(folder, settings, tensors=None):
    import torch
    from transformers import AutoModelForCausalLM

    folder_with(folder, (lambda _: tensors) if tensors else lambda x: x, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def without(name: str) -> Any:
    return lambda tensors: {key: x for key, x in tensors.items() if name not in key}


def also(name: str, shape: tuple[int, ...] = (8,), dtype: Any = np.float32) -> Any:
    return lambda tensors: tensors | {name: np.ones(shape, dtype)}
