"""Loads a Llama from a GGUF file, as llama.cpp does; an unsupported setting "llama.*" or tensor is an error."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from llama import LlamaConfig
from llama_params import Checkpoint, Names, Params, Source, read_params

import mqa_jax
from mqa_jax import torch_interop
from mqa_jax.torch_interop.hugging_face import weight_files

NAMES = Names(
    layer="blk.{}.",
    attention={"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"},
    mlp={"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"},
    norms={"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"},
    embed="token_embd.weight",
    norm="output_norm.weight",
    lm_head="output.weight",
)
PARTS = "weight", "bias"
ROPE_FACTORS = "rope_freqs.weight"

# Settings for which `Llama` supports only one value. Other values, and other settings, are errors.
ONLY = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "pooling_type": 0,
    "use_parallel_residual": False,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "tensor_data_layout": "Meta AI original pth",
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_attn_factor": 1.0,
}


class Settings:
    """The settings "llama.*" of a file; `left` are those that have not been read."""

    def __init__(self, metadata: dict[str, Any], place: str):
        self.left = {name[6:]: value for name, value in metadata.items() if name.startswith("llama.")}
        self.place = place

    def __call__(self, name: str, kind: type, default: Any = None) -> Any:
        """A value of this type; if the file has one for each layer, they must all be equal."""
        value = self.left.pop(name, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise NotImplementedError(
                    f"Layers that differ are not supported: llama.{name}={value} in {self.place!r}."
                )
            value = value[0]
        if value is None and default is None:
            raise ValueError(f"There is no llama.{name} in {self.place!r}.")
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"The type must be {kind.__name__}: llama.{name}={value!r} in {self.place!r}.")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value = self(name, int, default)
        if value < 1:
            raise ValueError(f"A size is positive: llama.{name}={value} in {self.place!r}.")
        return value

    def check_nothing_left(self) -> None:
        wrong = {f"llama.{name}": value for name, value in self.left.items() if ONLY.get(name, ()) != value}
        if wrong:
            raise NotImplementedError(f"Unsupported settings: {wrong} in {self.place!r}.")


def load_gguf(path: Path) -> Checkpoint:
    import gguf

    place, reader = str(path), open_gguf(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        try:
            return gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # float32 [out, in]
        except NotImplementedError as error:
            raise NotImplementedError(
                f"Tensors of this type are not supported: {name} in {place!r} is {tensor.tensor_type.name}."
            ) from error

    def attention(layer: int) -> Params:
        prefix = NAMES.layer.format(layer)
        tensor_names = {
            f"{layout_name}.{part}": f"{prefix}{name}.{part}"
            for layout_name, name in NAMES.attention.items()
            for part in PARTS
        }
        state = {layout_name: read(name) for layout_name, name in tensor_names.items() if name in tensors}
        return torch_interop.from_state_dict(state, heads=config.heads, kv_heads=config.kv_heads, layout="llama")

    check_kind(metadata, place)
    factors = read(ROPE_FACTORS) if ROPE_FACTORS in tensors else None
    config = read_config(Settings(metadata, place), tensors, factors)
    present = set(tensors) - {ROPE_FACTORS}
    return Checkpoint(config, read_params(config, NAMES, Source(place, present, read, attention)), metadata)


def read_config(settings: Settings, tensors: dict[str, Any], factors: np.ndarray | None) -> LlamaConfig:
    """The sizes of the model. `factors`: the file's divisors of RoPE's frequencies, if any."""
    place = settings.place
    if NAMES.embed not in tensors:
        raise ValueError(f"Tensors are missing in {place!r}: {NAMES.embed}.")
    vocabulary = int(tensors[NAMES.embed].shape[1])
    if settings.size("vocab_size", vocabulary) != vocabulary:
        raise ValueError(f"llama.vocab_size is not the {vocabulary} rows of {NAMES.embed}, in {place!r}.")
    dim, heads = settings.size("embedding_length"), settings.size("attention.head_count")
    head_dim = settings.size("attention.key_length", dim // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (value := settings.size(name, head_dim)) != head_dim:
            raise NotImplementedError(
                f"Only llama.{name} = features of a head, {head_dim}, is supported: it is {value} in {place!r}."
            )
    window = settings("attention.sliding_window", int, 0)  # includes the query's own position
    if window < 0:
        raise ValueError(f"A window has a size: llama.attention.sliding_window={window} in {place!r}.")
    max_length = settings.size("context_length")
    config = LlamaConfig(
        vocabulary=vocabulary,
        layers=settings.size("block_count"),
        dim=dim,
        hidden=settings.size("feed_forward_length"),
        heads=heads,
        kv_heads=settings.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_length=max_length,
        rope=read_rope(settings, max_length, factors),
        norm_eps=settings("attention.layer_norm_rms_epsilon", float),
        tied_embeddings=NAMES.lm_head not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        attention_out_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        window=window - 1 if window else None,
    )
    settings.check_nothing_left()
    return config


def read_rope(settings: Settings, max_length: int, factors: np.ndarray | None) -> mqa_jax.Rope:
    """The rotary embedding; GGUF files of architecture llama have interleaved pairs of features."""
    given = {name: value for name, value in settings.left.items() if name.startswith("rope.scal")}
    theta = settings("rope.freq_base", float, 10_000.0)
    kind = settings("rope.scaling.type", str, "linear")
    older = settings("rope.scale_linear", float, 1.0)
    factor = settings("rope.scaling.factor", float, older) or 1.0  # 0 is none
    magnitude = settings("rope.scaling.attn_factor", float, 1.0)
    mix = settings("rope.scaling.yarn_ext_factor", float, -1.0)  # -1: the default of the type
    settings("rope.scaling.finetuned", bool, False)  # about training
    original = settings("rope.scaling.original_context_length", int, max_length) or max_length
    fast, slow = (settings(f"rope.scaling.yarn_beta_{name}", float, x) for name, x in (("fast", 32.0), ("slow", 1.0)))
    rope = functools.partial(mqa_jax.Rope, theta=theta, interleaved=True)
    if kind == "yarn" and mix in (-1, 1) and factors is None:
        scaling = mqa_jax.YarnScaling(
            factor=factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow
        )
        return rope(scaling=replace(scaling, attention_factor=magnitude * scaling.magnitude))
    if kind in ("linear", "none") and mix in (-1, 0) and magnitude == factor == 1:
        table = None if factors is None else mqa_jax.TableScaling(factors=tuple(factors.ravel().tolist()))
        return rope(scaling=table)
    if kind == "linear" and mix in (-1, 0) and magnitude == 1 and factors is None:
        return rope(scaling=mqa_jax.LinearScaling(factor=factor))
    raise NotImplementedError(
        f"This scaling of RoPE is not supported: {given}{'' if factors is None else f' and {ROPE_FACTORS}'} in "
        f"{settings.place!r}. Supported are rope.scaling.type='linear', 'yarn', and {ROPE_FACTORS} by itself."
    )


def open_gguf(path: Path) -> Any:
    """The reader of the package gguf, with an error for truncated files, from which it would read empty arrays."""
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, *more: Any, **options: Any) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends at byte {len(self.data):,}, before the end of its contents")
            return super()._get(offset, dtype, count, *more, **options)

    what = weight_files.foreign(path)
    if what not in (None, "a GGUF file"):
        raise ValueError(f"This is not a GGUF file: {str(path)!r} is {what}.")
    try:
        return Reader(path)
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"Truncated, damaged, or not GGUF of version 2 or 3: {str(path)!r} ({error}).") from error


def check_kind(metadata: dict[str, Any], place: str) -> None:
    """Raises if the file is not a whole model of architecture llama."""
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if any(name.startswith("adapter.") for name in metadata):
        kind = "adapter"
    if architecture != "llama" or kind != "model":
        raise NotImplementedError(
            f"Only llama models: general.architecture={architecture!r}, general.type={kind!r} in {place!r}."
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise NotImplementedError(
            f"This is one of split.count={metadata['split.count']} files: {place!r}. Merge them with "
            "llama-gguf-split --merge."
        )
