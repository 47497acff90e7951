"""Calls attention layers of PyTorch libraries with their masks, positions and caches. This module imports torch.

A call takes hidden states `[batch, length, features]` of tokens that follow the cached ones, and returns as many.
"""

import inspect
import math
import sys
from typing import Any, Protocol

import torch

from mqa_jax.torch_interop import modules
from mqa_jax.torch_interop.hugging_face import attention as hf_attention


class Call(Protocol):
    """Calls a layer on `x`; `cache` is the result of `new_cache`, or None to attend only to `x`."""

    def __call__(self, layer: Any, x: torch.Tensor, cache: Any = None) -> torch.Tensor: ...


def call(layer: Any, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Calls any layer that `from_torch` supports; for other layers returns the first result of `layer(x)`."""
    if isinstance(layer, torch.nn.MultiheadAttention):
        arranged = x if layer.batch_first else x.transpose(0, 1)
        out = layer(arranged, arranged, arranged, need_weights=False)[0]
        return out if layer.batch_first else out.transpose(0, 1)
    kind = type(layer).__name__
    if kind == "BertAttention":
        return layer.output.dense(layer.self(x)[0])
    if kind in _CALLS:
        return _CALLS[kind](layer, x, cache)
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


def new_cache(layer: Any) -> Any | None:
    """An empty cache for the layer, or None if `call` does not support caches of its class."""
    if type(layer).__name__ not in _CALLS:
        return None
    from transformers import DynamicCache

    return DynamicCache()


def _length(layer: Any, cache: Any) -> int:
    return 0 if cache is None else cache.get_seq_length(layer.layer_idx)


def _cached(layer: Any, cache: Any) -> dict[str, Any]:
    """The cache as a keyword argument, whose name depends on the class and on the version of transformers."""
    names = inspect.signature(layer.forward).parameters
    return {next(name for name in ("cache", "past_key_values", "layer_past") if name in names): cache}


def _hidden(layer: Any, x: torch.Tensor, cache: Any, window: int | None = None) -> torch.Tensor:
    """True where a token may not attend, `[T, S]`: to later tokens, and beyond a window that includes the token."""
    start = _length(layer, cache)
    query, key = torch.arange(start, start + x.shape[1])[:, None], torch.arange(start + x.shape[1])
    hidden = key > query
    return hidden if window is None else hidden | (key <= query - window)


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def _rotary(layer: Any, x: torch.Tensor, cache: Any) -> Any:
    """Cosines and sines, by the class that its model uses."""
    names = vars(sys.modules[type(layer).__module__])
    rotary = next(x for name, x in names.items() if name.endswith("RotaryEmbedding"))
    start = _length(layer, cache)
    return rotary(layer.config)(x, torch.arange(start, start + x.shape[1])[None])


def _llama(layer: Any, x: torch.Tensor, cache: Any) -> torch.Tensor:
    window = hf_attention.attention_of(modules.config_of(layer) or {}, layer.layer_idx)[0].local_window_size
    size = window[0] + 1 if isinstance(window, tuple) else None
    mask = _additive(_hidden(layer, x, cache, size), x.dtype)
    return layer(x, _rotary(layer, x, cache), mask, **_cached(layer, cache))[0]


def _gpt_bigcode(layer: Any, x: torch.Tensor, cache: Any) -> torch.Tensor:
    mask = _additive(_hidden(layer, x, cache), x.dtype)
    return layer(x, attention_mask=mask, **_cached(layer, cache))[0]


def _falcon(layer: Any, x: torch.Tensor, cache: Any) -> torch.Tensor:
    mask = _additive(_hidden(layer, x, cache), x.dtype)
    if not layer.config.alibi:
        return layer(x, None, mask, position_embeddings=_rotary(layer, x, cache), **_cached(layer, cache))[0]
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    keys = torch.ones(1, mask.shape[-1], dtype=torch.int64)
    alibi = build_alibi_tensor(keys, layer.num_heads, x.dtype)
    # Added to the mask, as "sdpa" does; "eager", which would add it again, gets zeros.
    nothing = torch.zeros(len(x), *alibi.shape, dtype=x.dtype)
    return layer(x, nothing, mask + alibi / math.sqrt(layer.head_dim), **_cached(layer, cache))[0]


def _mpt(layer: Any, x: torch.Tensor, cache: Any) -> torch.Tensor:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    alibi = build_mpt_alibi_tensor(layer.n_heads, layer.max_seq_length).to(x.dtype)
    return layer(x, alibi, attention_mask=_hidden(layer, x, cache)[None, None], **_cached(layer, cache))[0]


_CALLS = {
    "LlamaAttention": _llama,
    "MistralAttention": _llama,
    "Qwen2Attention": _llama,
    "GPTBigCodeAttention": _gpt_bigcode,
    "FalconAttention": _falcon,
    "MptAttention": _mpt,
}
