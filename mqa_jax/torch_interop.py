"""Weights of PyTorch attention layers as parameters of our modules. Plain arrays: torch itself is never imported.

A layer is recognised by the names in its state dict. `N`, `K`, `H`, `D` as in `mqa_jax.shapes`; torch's linear layers
hold `[out, in]`, ours `[in, out]`.

    fused       Wqkv with rows q of all heads | k | v, out_proj, (q_ln, k_ln)     mqa, zeta, llm-foundry, FlashMHA
    unfused     Wq, Wk, Wv, out_proj, (q_ln, k_ln)                                llm-foundry
    torch       in_proj_weight with rows q | k | v, or {q,k,v}_proj_weight        torch.nn.MultiheadAttention
    llama       q_proj, k_proj, v_proj, o_proj                                    Hugging Face
    lucidrains  to_q, to_kv with rows k | v, to_out                               FlashMHA's other FlashAttention
    knotgrass   query, querys.{i}, multihead.{i}, grouped.{g}, proj               knotgrass/attention
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

StateDict = Mapping[str, Any]
Params = dict[str, Any]


class Linear(NamedTuple):
    """A torch linear layer: weight `[out, in]`, bias `[out]` or None."""

    weight: Any
    bias: Any | None = None

    def rows(self, start: int, stop: int) -> "Linear":
        return Linear(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


class Layer(NamedTuple):
    """The four projections of an attention layer, and parameters that have names of their own."""

    query: Linear
    key: Linear | None
    value: Linear | None
    out: Linear | None
    others: Mapping[str, Any] = MappingProxyType({})


def from_state_dict(state_dict: StateDict, *, heads: int, kv_heads: int | None = None, prefix: str = "") -> Params:
    """Parameters of one of our modules from a torch state dict.

    Args:
      state_dict: names and arrays: torch tensors, numpy or JAX arrays. Dtypes are kept.
      heads: query heads, N.
      kv_heads: key/value heads, K. Default N.
      prefix: take only the names that start with it, without it.

    Returns:
      `{"query": {"kernel": [D, N, H], "bias": [N, H]}, "key": ..., "value": ..., "out": {"kernel": [N, H, D], ...}}`.

    Raises:
      ValueError: the layout is not one of the above, or a tensor is missing, left over or misshapen.
    """
    tensors = {name.removeprefix(prefix): _array(x) for name, x in state_dict.items() if name.startswith(prefix)}
    kv_heads = heads if kv_heads is None else kv_heads
    for marker, read in _READERS:
        if marker in tensors:
            unread = _Tensors(tensors)
            layer = read(unread, heads, kv_heads)
            unread.check_all_read(marker)
            return _params(layer, heads, kv_heads)
    raise ValueError(
        f"No known attention layout: found {_shapes(tensors)} under {prefix=}; "
        f"expected one of {[marker for marker, _ in _READERS]}."
    )


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


class _Tensors:
    """A state dict that knows what has been read from it."""

    def __init__(self, tensors: dict[str, Any]):
        self.tensors, self.unread = tensors, set(tensors)

    def __call__(self, name: str) -> Any:
        if name not in self.tensors:
            raise ValueError(f"Missing tensor {name!r}: found {_shapes(self.tensors)}.")
        self.unread.discard(name)
        return self.tensors[name]

    def optional(self, name: str) -> Any | None:
        return self(name) if name in self.tensors else None

    def linear(self, name: str) -> Linear:
        return Linear(self(f"{name}.weight"), self.optional(f"{name}.bias"))

    def norms(self) -> Params:
        """q_ln and k_ln, with or without a bias."""
        norms: Params = {}
        for name in ("q_ln", "k_ln"):
            if f"{name}.weight" in self.tensors:
                norms[name] = {"scale": self(f"{name}.weight")}
                if f"{name}.bias" in self.tensors:
                    norms[name]["bias"] = self(f"{name}.bias")
        return norms

    def count(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... there are."""
        count = 0
        while pattern.format(count) in self.tensors:
            count += 1
        return count

    def stacked(self, names: list[str]) -> Linear:
        """Linear layers of single heads, one above the other."""
        layers = [self.linear(name) for name in names]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return Linear(_concatenate([layer.weight for layer in layers]), _concatenate(biases) if biases else None)

    def check_all_read(self, marker: str) -> None:
        if self.unread:
            left = {name: self.tensors[name] for name in sorted(self.unread)}
            raise ValueError(f"Tensors that do not belong to a layer with {marker!r}: {_shapes(left)}.")


def _fused(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    return _split(tensors.linear("Wqkv"), heads, kv_heads, tensors.linear("out_proj"), tensors.norms())


def _unfused(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    own_keys = "Wk.weight" in tensors.tensors  # a layer that reuses another one's keys has only Wq
    key, value = (tensors.linear(name) if own_keys else None for name in ("Wk", "Wv"))
    return Layer(tensors.linear("Wq"), key, value, tensors.linear("out_proj"), tensors.norms())


def _torch(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    bias, out = tensors.optional("in_proj_bias"), tensors.linear("out_proj")
    others: Params = {
        name: tensors(name).reshape(heads, -1) for name in ("bias_k", "bias_v") if name in tensors.tensors
    }
    if "in_proj_weight" in tensors.tensors:
        return _split(Linear(tensors("in_proj_weight"), bias), heads, heads, out, others)
    biases = (None,) * 3 if bias is None else [bias[i * len(bias) // 3 : (i + 1) * len(bias) // 3] for i in range(3)]
    query, key, value = (Linear(tensors(f"{n}_proj_weight"), b) for n, b in zip("qkv", biases))
    return Layer(query, key, value, out, others)


def _llama(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    query, key, value, out = (tensors.linear(f"{name}_proj") for name in "qkvo")
    return Layer(query, key, value, out)


def _lucidrains(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    key_value = tensors.linear("to_kv")
    half = key_value.weight.shape[0] // 2
    key, value = key_value.rows(0, half), key_value.rows(half, 2 * half)
    return Layer(tensors.linear("to_q"), key, value, tensors.linear("to_out"))


def _knotgrass_attention(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    query, key, value = (tensors.linear(name) for name in ("query", "key", "value"))
    return Layer(query, key, value, None)


def _knotgrass_multihead(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    count = tensors.count("multihead.{}.query.weight")
    query, key, value = (
        tensors.stacked([f"multihead.{i}.{name}" for i in range(count)]) for name in ("query", "key", "value")
    )
    return Layer(query, key, value, tensors.linear("proj"))


def _knotgrass_multiquery(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    query = tensors.stacked([f"querys.{i}" for i in range(tensors.count("querys.{}.weight"))])
    return Layer(query, tensors.linear("key"), tensors.linear("value"), tensors.linear("proj"))


def _knotgrass_grouped(tensors: _Tensors, heads: int, kv_heads: int) -> Layer:
    """Each group has an output projection of its own before the common one; the two fold into one product."""
    groups = range(tensors.count("grouped.{}.key.weight"))
    queries = range(tensors.count("grouped.0.querys.{}.weight"))
    query = tensors.stacked([f"grouped.{g}.querys.{i}" for g in groups for i in queries])
    key, value = (tensors.stacked([f"grouped.{g}.{name}" for g in groups]) for name in ("key", "value"))
    outer = tensors("proj.weight")  # [e, e * groups]
    width = outer.shape[1] // len(groups)
    folded = [outer[:, g * width : (g + 1) * width] @ tensors(f"grouped.{g}.proj.weight") for g in groups]
    return Layer(query, key, value, Linear(_concatenate(folded, axis=1)))


# A name that only this layout has, and what reads it. The first match counts: knotgrass's classes share names.
_READERS: list[tuple[str, Callable[[_Tensors, int, int], Layer]]] = [
    ("Wqkv.weight", _fused),
    ("Wq.weight", _unfused),
    ("in_proj_weight", _torch),
    ("q_proj_weight", _torch),
    ("q_proj.weight", _llama),
    ("to_q.weight", _lucidrains),
    ("multihead.0.query.weight", _knotgrass_multihead),
    ("querys.0.weight", _knotgrass_multiquery),
    ("grouped.0.key.weight", _knotgrass_grouped),
    ("query.weight", _knotgrass_attention),
]


def _split(fused: Linear, heads: int, kv_heads: int, out: Linear, others: Mapping[str, Any]) -> Layer:
    """Rows [q of all heads | k of all heads | v of all heads]."""
    head_dim, rest = divmod(fused.weight.shape[0], heads + 2 * kv_heads)
    if rest:
        raise ValueError(
            "The rows of the fused projection must be (heads + 2 * kv_heads) * head_dim: "
            f"rows={fused.weight.shape[0]}, heads={heads}, kv_heads={kv_heads}."
        )
    ends = heads * head_dim, (heads + kv_heads) * head_dim, (heads + 2 * kv_heads) * head_dim
    query, key, value = (fused.rows(start, stop) for start, stop in zip((0, *ends), ends))
    return Layer(query, key, value, out, others)


def _params(layer: Layer, heads: int, kv_heads: int) -> Params:
    params: Params = dict(layer.others)
    inputs = ("query", layer.query, heads), ("key", layer.key, kv_heads), ("value", layer.value, kv_heads)
    for name, linear, count in inputs:
        if linear is not None:
            params[name] = _input_projection(name, linear, count)
    if layer.out is not None:
        features = params["query"]["kernel"].shape[1:]  # [N, H]
        if layer.out.weight.shape[1] != features[0] * features[1]:
            raise ValueError(
                "The output projection must take all heads, [D, N * H]: "
                f"weight.shape={layer.out.weight.shape}, N={features[0]}, H={features[1]}."
            )
        params["out"] = {"kernel": layer.out.weight.T.reshape(*features, -1)}
        if layer.out.bias is not None:
            params["out"]["bias"] = layer.out.bias
    return params


def _input_projection(name: str, linear: Linear, count: int) -> Params:
    rows, features = linear.weight.shape
    if rows % count:
        raise ValueError(f"The rows of the {name} projection must be heads * head_dim: {rows=}, heads={count}.")
    kernel = {"kernel": linear.weight.T.reshape(features, count, -1)}
    return kernel if linear.bias is None else {**kernel, "bias": linear.bias.reshape(count, -1)}


def _array(x: Any) -> Any:
    """A torch tensor as numpy; other arrays as they are."""
    return x.detach().cpu().numpy() if hasattr(x, "detach") else x


def _concatenate(arrays: list[Any], axis: int = 0) -> Any:
    """With numpy for numpy arrays, with JAX for JAX arrays, so that JAX can differentiate a conversion."""
    if all(isinstance(x, np.ndarray) for x in arrays):
        return np.concatenate(arrays, axis)
    return jnp.concatenate(arrays, axis)


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}
