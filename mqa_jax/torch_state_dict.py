"""Weights of PyTorch attention layers as parameters of our modules, and back. torch itself is never imported here.

`mqa_jax.torch_layouts` has the table of layouts. `N`, `K`, `H`, `D` are as in `mqa_jax.shapes`; torch's linear layers
hold `[out, in]`, ours `[in, heads, H]` and `[heads, H, out]`.
"""

import sys
from collections.abc import Mapping
from typing import Any

from mqa_jax import torch_arrays, torch_layouts, torch_weights
from mqa_jax.torch_layouts import Params

StateDict = Mapping[str, Any]


def from_state_dict(
    state_dict: StateDict, *, heads: int, kv_heads: int | None = None, prefix: str = "", layout: str | None = None
) -> Params:
    """Parameters of one of our modules from a torch state dict.

    Args:
      state_dict: names and arrays: torch tensors (on any device, bfloat16 included), numpy or JAX arrays. Dtypes are
        kept; of a contiguous tensor on the CPU nothing is copied that need not be.
      heads: query heads, N.
      kv_heads: key/value heads, K. Default N.
      prefix: take only the names that start with it, without it.
      layout: a name of `mqa_jax.torch_layouts`. Default: recognised by the names and shapes of the tensors.

    Returns:
      `{"query": {"kernel": [D, N, H], "bias": [N, H]}, "key": ..., "value": ..., "out": {"kernel": [N, H, D], ...}}`.

    Raises:
      ValueError: the layout is unknown, or is one of several with these names and shapes; or a tensor is missing,
        unexpected or misshapen; with what was found and what was expected. What is known to say nothing of the layer
        may be there, see `torch_layouts.is_ignored`.
      NotImplementedError: the weights are quantised.
    """
    tensors = {name.removeprefix(prefix): _array(x, name) for name, x in state_dict.items() if name.startswith(prefix)}
    kv_heads = _checked_kv_heads(heads, kv_heads)
    name, known = torch_layouts.find(layout, tensors, heads, kv_heads)
    return torch_weights.read(name, known, tensors, heads, kv_heads)


def to_state_dict(params: Params, *, layout: str, prefix: str = "") -> dict[str, Any]:
    """The state dict of a torch layer from parameters of one of our modules: `from_state_dict` backwards, bitwise.

    Arrays stay numpy or JAX arrays; `torch.nn.Module.load_state_dict` wants `torch.from_numpy(np.array(x))` of each.
    The two output projections of knotgrass's grouped class come back as one, before the sum over groups.

    Args:
      params: with "query" `{"kernel": [D, N, H]}` and so on; numbers of heads are those of the kernels.
      layout: a name of `mqa_jax.torch_layouts`.
      prefix: put before each name.
    """
    heads = params["query"]["kernel"].shape[1]
    kv_heads = params["key"]["kernel"].shape[1] if "key" in params else heads
    _, known = torch_layouts.find(layout, {}, heads, kv_heads)
    return {f"{prefix}{name}": x for name, x in torch_weights.write(known, params).items()}


def past_key_value_from_torch(key: Any, value: Any, kv_heads: int) -> tuple[Any, Any]:
    """A cache of mqa, zeta or llm-foundry as `past_key_value`: each `[batch, length, kv_heads, head_dim]`.

    Theirs is `[b, kv, head_dim, s]` and `[b, kv, s, head_dim]` with attn_impl="torch", else `[b, s, kv * head_dim]`.
    """
    key, value = _array(key), _array(value)
    if key.ndim == 3 and value.ndim == 3:
        return tuple(x.reshape(*x.shape[:2], kv_heads, -1) for x in (key, value))
    if key.ndim == 4 and value.ndim == 4 and key.shape[1] == value.shape[1] == kv_heads:
        return key.transpose(0, 3, 1, 2), value.transpose(0, 2, 1, 3)
    raise ValueError(
        "A cache is [b, kv, head_dim, s] and [b, kv, s, head_dim], or [b, s, kv * head_dim] twice: "
        f"{key.shape=}, {value.shape=}, {kv_heads=}."
    )


def interleaved_to_halves(weight: Any, heads: int) -> Any:
    """Rows of a query or key projection, from the rotary convention of GGUF's Llama files and GPT-J to Hugging Face's.

    Interleaved, a head's features 2i and 2i + 1 turn together (`Rope(interleaved=True)`); in halves, i and i + H/2
    (`Rope()`). With the rows of both projections reordered, attention is the same.

    Args:
      weight: `[heads * H, ...]`, or a bias `[heads * H]`.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def halves_to_interleaved(weight: Any, heads: int) -> Any:
    """The way back."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _checked_kv_heads(heads: int, kv_heads: int | None) -> int:
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads: heads={heads}, kv_heads={kv_heads}.")
    return kv_heads


def _array(x: Any, name: str = "a cache") -> Any:
    """A torch tensor as numpy, or as a JAX array if it is on a GPU; other arrays as they are. No copy if avoidable."""
    if not torch_arrays.is_tensor(x):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise NotImplementedError(f"Only arrays are read, not packed weights: {name} is a {type(x).__name__}.")
        return x
    if x.is_meta or x.layout is not sys.modules["torch"].strided:
        raise ValueError(
            f"There are no numbers in memory, one after the other: {name} has device='{x.device}', layout={x.layout}. "
            "Load the weights, densely."
        )
    return torch_arrays.to_numpy(x) if x.device.type == "cpu" else torch_arrays.to_jax(x)
