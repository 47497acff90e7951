"""Converts weights of PyTorch attention layers to parameters of Flax modules, and back. It does not import torch.

`layouts` has the table of layouts. `N`, `K`, `H`, `D` are as in `mqa_jax.shapes`; weights of torch's linear layers are
`[out, in]`, kernels of the Flax modules `[in, heads, H]` and `[heads, H, out]`.
"""

import sys
from collections.abc import Mapping
from typing import Any

from mqa_jax.torch_interop import arrays, layouts, weights
from mqa_jax.torch_interop.layouts import Params

StateDict = Mapping[str, Any]


def from_state_dict(
    state_dict: StateDict, *, heads: int, kv_heads: int | None = None, prefix: str = "", layout: str | None = None
) -> Params:
    """Parameters of a Flax module from a torch state dict.

    Args:
      state_dict: names and arrays: torch tensors (on any device, bfloat16 included), numpy or JAX arrays. Dtypes are
        kept; contiguous tensors on the CPU are copied only where rows are reordered.
      heads: query heads, N.
      kv_heads: key/value heads, K. Default N.
      prefix: take only the names that start with it, without it.
      layout: a name of `mqa_jax.torch_interop.layouts`. Default: recognised by the names and shapes of the tensors.

    Returns:
      `{"query": {"kernel": [D, N, H], "bias": [N, H]}, "key": ..., "value": ..., "out": {"kernel": [N, H, D], ...}}`.

    Raises:
      ValueError: the layout is unknown, or is one of several with these names and shapes; or a tensor is missing,
        unexpected or misshapen; with the found and the expected shapes. Tensors of `layouts.is_ignored` are allowed.
      NotImplementedError: the weights are quantised.
    """
    tensors = {name.removeprefix(prefix): _array(x, name) for name, x in state_dict.items() if name.startswith(prefix)}
    kv_heads = _checked_kv_heads(heads, kv_heads)
    name, known = layouts.find(layout, tensors, heads, kv_heads)
    return weights.read(name, known, tensors, heads, kv_heads)


def to_state_dict(params: Params, *, layout: str, prefix: str = "") -> dict[str, Any]:
    """The state dict of a torch layer from parameters of a Flax module: the inverse of `from_state_dict`, bitwise.

    Arrays stay numpy or JAX arrays; `torch.nn.Module.load_state_dict` needs `torch.from_numpy(np.array(x))` of each.
    The two output projections of knotgrass's grouped class are returned as one, before the sum over groups.

    Args:
      params: with "query" `{"kernel": [D, N, H]}` and so on; the kernels have the numbers of heads.
      layout: a name of `mqa_jax.torch_interop.layouts`.
      prefix: put before each name.
    """
    heads = params["query"]["kernel"].shape[1]
    kv_heads = params["key"]["kernel"].shape[1] if "key" in params else heads
    _, known = layouts.find(layout, {}, heads, kv_heads)
    return {f"{prefix}{name}": x for name, x in weights.write(known, params).items()}


def past_key_value_from_torch(key: Any, value: Any, kv_heads: int) -> tuple[Any, Any]:
    """A cache of mqa, zeta or llm-foundry as `past_key_value`: each `[batch, length, kv_heads, head_dim]`.

    Their caches are `[b, kv, head_dim, s]` and `[b, kv, s, head_dim]` with attn_impl="torch", else
    `[b, s, kv * head_dim]`.
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

    Interleaved, features 2i and 2i + 1 of a head are rotated as a pair (`Rope(interleaved=True)`); in halves, features
    i and i + H/2 (`Rope()`). With the rows of both projections reordered, attention is the same.

    Args:
      weight: `[heads * H, ...]`, or a bias `[heads * H]`.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def halves_to_interleaved(weight: Any, heads: int) -> Any:
    """The inverse of `interleaved_to_halves`."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _checked_kv_heads(heads: int, kv_heads: int | None) -> int:
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads: heads={heads}, kv_heads={kv_heads}.")
    return kv_heads


def _array(x: Any, name: str = "a cache") -> Any:
    """A torch tensor as numpy, or as a JAX array if it is on a GPU; other arrays unchanged. No copy where possible."""
    if not arrays.is_tensor(x):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise NotImplementedError(f"Only arrays are read, not packed weights: {name} is a {type(x).__name__}.")
        return x
    if x.is_meta or x.layout is not sys.modules["torch"].strided:
        raise ValueError(
            f"The tensor is not dense in memory: {name} has device='{x.device}', layout={x.layout}. "
            "Load the weights as dense tensors."
        )
    return arrays.to_numpy(x) if x.device.type == "cpu" else arrays.to_jax(x)
