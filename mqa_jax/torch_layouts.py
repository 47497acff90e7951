"""How PyTorch attention layers lay out their weights: one table, read from left to right and from right to left.

A layout says, for each tensor of a state dict, which heads its rows belong to, in order. Everything else follows: the
parameters of our modules, the state dict back again (bitwise, since nothing is computed), and which shapes are right.

    name          rows of its tensors                                             layers
    fused         Wqkv: q of all heads | k of all | v of all                      mqa, zeta, llm-foundry, MPT, FlashMHA
    unfused       Wq, Wk, Wv; with reused keys Wq alone                           llm-foundry
    torch         in_proj_weight: q | k | v                                       torch.nn.MultiheadAttention
    torch_kdim    q_proj_weight, k_proj_weight, v_proj_weight; in_proj_bias       the same with kdim or vdim
    llama         q_proj, k_proj, v_proj, o_proj                                  Llama, Mistral, Qwen2, SmolLM
    falcon        query_key_value: for each k/v head its q heads, then k, then v  Falcon 7B, 40B, and with plain MHA
    gpt_bigcode   c_attn: the same                                                GPTBigCode (StarCoder), MQA and MHA
    bert          self.query, self.key, self.value, output.dense                  BERT, RoBERTa, MiniLM
    lucidrains    to_q; to_kv: k of all heads | v of all                          FlashMHA's other FlashAttention
    knotgrass     query, key, value of one head, or one of these for each head    knotgrass's four classes
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
Block = tuple[str, int]  # the rows of one head: "query", "key" or "value", and its number
Rows = Mapping[str, list[Block]]


@dataclass(frozen=True)
class Layout:
    """One row of the table above, for given numbers of heads.

    Attributes:
      weights, biases: tensor -> heads of its rows. All weights have to be there; biases are all there, or none.
      out: the output projection, None without one; its weight is `[D, N * H]`.
      folded: two output projections one after the other, of each group and of all: a name with the group's number.
      others: tensor -> where it is among our parameters, and how many heads it is split into (None: as it is).
    """

    weights: Rows
    biases: Rows
    out: str | None
    folded: str | None = None
    others: Mapping[str, tuple[tuple[str, ...], int | None]] = field(default_factory=dict)

    @property
    def folded_names(self) -> list[str]:
        """One for each group."""
        groups = sum(kind == "key" for blocks in self.weights.values() for kind, _ in blocks)
        return [] if self.folded is None else [self.folded.format(group) for group in range(groups)]

    @property
    def names(self) -> set[str]:
        """Of all tensors that it may have."""
        outer = [] if self.out is None else [f"{self.out}.weight", f"{self.out}.bias"]
        return {*self.weights, *self.biases, *self.others, *self.folded_names, *outer}


def _all(kind: str, count: int) -> list[Block]:
    return [(kind, head) for head in range(count)]


def _linear(rows: Rows, out: str | None, **more: Any) -> Layout:
    """Linear layers, each with `.weight` and perhaps `.bias`."""
    suffixed = lambda suffix: {f"{name}.{suffix}": blocks for name, blocks in rows.items()}
    return Layout(suffixed("weight"), suffixed("bias"), out, **more)


NORMS = {
    f"{norm}.{theirs}": ((norm, ours), None)
    for norm in ("q_ln", "k_ln")
    for theirs, ours in (("weight", "scale"), ("bias", "bias"))
}


def _fused(heads: int, kv_heads: int) -> Layout:
    rows = [*_all("query", heads), *_all("key", kv_heads), *_all("value", kv_heads)]
    return _linear({"Wqkv": rows}, "out_proj", others=NORMS)


def _unfused(heads: int, kv_heads: int) -> Layout:
    rows = {"Wq": _all("query", heads), "Wk": _all("key", kv_heads), "Wv": _all("value", kv_heads)}
    return _linear(rows, "out_proj", others=NORMS)


def _unfused_without_keys(heads: int, kv_heads: int) -> Layout:
    return _linear({"Wq": _all("query", heads)}, "out_proj", others=NORMS)


def _torch(heads: int, kv_heads: int) -> Layout:
    kinds = ("query", "key", "value")
    rows = [block for kind in kinds for block in _all(kind, heads)]
    others = {name: ((name,), heads) for name in ("bias_k", "bias_v")}
    return Layout({"in_proj_weight": rows}, {"in_proj_bias": rows}, "out_proj", others=others)


def _torch_kdim(heads: int, kv_heads: int) -> Layout:
    packed = _torch(heads, kv_heads)
    weights = {f"{kind[0]}_proj_weight": _all(kind, heads) for kind in ("query", "key", "value")}
    return Layout(weights, packed.biases, packed.out, others=packed.others)


def _separate(query: str, key: str, value: str, out: str) -> Callable[[int, int], Layout]:
    return lambda heads, kv_heads: _linear(
        {query: _all("query", heads), key: _all("key", kv_heads), value: _all("value", kv_heads)}, out
    )


def _by_group(fused: str, out: str) -> Callable[[int, int], Layout]:
    """Also right for MQA, all of whose heads are one group, and MHA, whose groups have one head."""

    def layout(heads: int, kv_heads: int) -> Layout:
        group = heads // kv_heads
        queries = lambda k: [("query", k * group + i) for i in range(group)]
        rows = [block for k in range(kv_heads) for block in [*queries(k), ("key", k), ("value", k)]]
        return _linear({fused: rows}, out)

    return layout


def _lucidrains(heads: int, kv_heads: int) -> Layout:
    rows = {"to_q": _all("query", heads), "to_kv": [*_all("key", kv_heads), *_all("value", kv_heads)]}
    return _linear(rows, "to_out")


KNOTGRASS_QUERY = re.compile(r"((multihead|grouped)\.\d+\.)?(query|querys\.\d+)\.weight")
KNOTGRASS_KEY = re.compile(r"((multihead|grouped)\.\d+\.)?key\.weight")


def _knotgrass(heads: int, kv_heads: int) -> Layout:
    return _linear({kind: [(kind, 0)] for kind in ("query", "key", "value")}, None)


def _knotgrass_multihead(heads: int, kv_heads: int) -> Layout:
    kinds = ("query", "key", "value")
    return _linear({f"multihead.{i}.{kind}": [(kind, i)] for i in range(heads) for kind in kinds}, "proj")


def _knotgrass_multiquery(heads: int, kv_heads: int) -> Layout:
    queries = {f"querys.{i}": [("query", i)] for i in range(heads)}
    return _linear({**queries, "key": [("key", 0)], "value": [("value", 0)]}, "proj")


def _knotgrass_grouped(heads: int, kv_heads: int) -> Layout:
    group = heads // kv_heads
    rows: dict[str, list[Block]] = {}
    for g in range(kv_heads):
        rows |= {f"grouped.{g}.querys.{i}": [("query", g * group + i)] for i in range(group)}
        rows |= {f"grouped.{g}.{kind}": [(kind, g)] for kind in ("key", "value")}
    return _linear(rows, "proj", folded="grouped.{}.proj.weight")


# A tensor that tells the layout by its name, and the layout. Of several that are there the first counts.
LAYOUTS: dict[str, tuple[str, Callable[[int, int], Layout]]] = {
    "fused": ("Wqkv.weight", _fused),
    "unfused": ("Wk.weight", _unfused),
    "unfused_without_keys": ("Wq.weight", _unfused_without_keys),
    "torch": ("in_proj_weight", _torch),
    "torch_kdim": ("q_proj_weight", _torch_kdim),
    "llama": ("q_proj.weight", _separate("q_proj", "k_proj", "v_proj", "o_proj")),
    "falcon": ("query_key_value.weight", _by_group("query_key_value", "dense")),
    "gpt_bigcode": ("c_attn.weight", _by_group("c_attn", "c_proj")),
    "bert": ("self.query.weight", _separate("self.query", "self.key", "self.value", "output.dense")),
    "lucidrains": ("to_q.weight", _lucidrains),
    "knotgrass_multihead": ("multihead.0.query.weight", _knotgrass_multihead),
    "knotgrass_multiquery": ("querys.0.weight", _knotgrass_multiquery),
    "knotgrass_grouped": ("grouped.0.key.weight", _knotgrass_grouped),
    "knotgrass": ("query.weight", _knotgrass),
}


def find(name: str | None, tensors: Mapping[str, Any], heads: int, kv_heads: int) -> tuple[str, Layout]:
    """The layout of this name, or the one that the tensors tell."""
    if name is None:
        name = next((name for name, (marker, _) in LAYOUTS.items() if marker in tensors), None)
        if name is None:
            raise ValueError(
                f"No known attention layout: found {shapes(tensors)}; expected one of "
                f"{[marker for marker, _ in LAYOUTS.values()]}. Is the prefix right?"
            )
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layout={name!r}: use one of {list(LAYOUTS)}, or None to have it recognised.")
    return name, LAYOUTS[name][1](heads, kv_heads)


def knotgrass_settings(names: Iterable[str]) -> dict[str, Any]:
    """Its classes have a tensor for each head, so that the names tell how many there are. None of them is causal."""
    names = list(names)
    heads, kv_heads = (sum(bool(kind.fullmatch(name)) for name in names) for kind in (KNOTGRASS_QUERY, KNOTGRASS_KEY))
    return dict(heads=heads, kv_heads=kv_heads, causal=False) if heads else {}


# -- from a state dict ------------------------------------------------------------------------------------------------


def read(name: str, layout: Layout, tensors: Mapping[str, Any], heads: int, kv_heads: int) -> Params:
    """Parameters of our modules."""
    head_dim = _check(name, layout, tensors, heads, kv_heads)
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    params: Params = {}
    for kind, parts in _by_head(layout.weights, tensors, head_dim).items():
        rows = concatenate([parts[head] for head in range(counts[kind])])
        params[kind] = {"kernel": rows.T.reshape(rows.shape[1], counts[kind], head_dim)}
    if all(bias in tensors for bias in layout.biases):
        for kind, parts in _by_head(layout.biases, tensors, head_dim).items():
            if kind in params:
                params[kind]["bias"] = concatenate([parts[head] for head in range(counts[kind])]).reshape(-1, head_dim)
    if layout.out is not None:
        weight = _output_weight(layout, tensors)
        params["out"] = {"kernel": weight.T.reshape(heads, head_dim, -1)}
        if f"{layout.out}.bias" in tensors:
            params["out"]["bias"] = tensors[f"{layout.out}.bias"]
    for theirs, (ours, split) in layout.others.items():
        if theirs in tensors:
            _put(params, ours, tensors[theirs] if split is None else tensors[theirs].reshape(split, -1))
    return params


def _by_head(rows: Rows, tensors: Mapping[str, Any], head_dim: int) -> dict[str, dict[int, Any]]:
    parts: dict[str, dict[int, Any]] = {}
    for name, blocks in rows.items():
        for place, (kind, head) in enumerate(blocks):
            parts.setdefault(kind, {})[head] = tensors[name][place * head_dim : (place + 1) * head_dim]
    return parts


def _output_weight(layout: Layout, tensors: Mapping[str, Any]) -> Any:
    """Where there are two one after the other, their product."""
    outer, names = tensors[f"{layout.out}.weight"], layout.folded_names
    if not names:
        return outer
    parts = split_columns(outer, len(names))
    return concatenate([part @ tensors[name] for part, name in zip(parts, names)], axis=1)


# -- to a state dict --------------------------------------------------------------------------------------------------


def write(layout: Layout, params: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict from which `read` makes these parameters."""
    wanted = {kind for blocks in layout.weights.values() for kind, _ in blocks} | ({"out"} if layout.out else set())
    others = {ours[0] for ours, _ in layout.others.values()}
    if not wanted <= set(params) <= wanted | others:
        raise ValueError(
            f"These parameters do not fit the layout: found {sorted(params)}, expected {sorted(wanted)} and perhaps "
            f"{sorted(others)}."
        )
    tensors = {}
    for rows, part in ((layout.weights, "kernel"), (layout.biases, "bias")):
        kinds = {kind for blocks in rows.values() for kind, _ in blocks}
        if all(part in params[kind] for kind in kinds):
            for name, blocks in rows.items():
                tensors[name] = concatenate([_head(params[kind][part], head) for kind, head in blocks])
    if layout.out is not None:
        kernel = params["out"]["kernel"]
        tensors |= _output(layout, kernel.reshape(-1, kernel.shape[-1]).T)
        if "bias" in params["out"]:
            tensors[f"{layout.out}.bias"] = params["out"]["bias"]
    for theirs, (ours, split) in layout.others.items():
        if ours[0] in params and (len(ours) == 1 or ours[1] in params[ours[0]]):
            found = params[ours[0]] if len(ours) == 1 else params[ours[0]][ours[1]]
            tensors[theirs] = found if split is None else found.reshape(1, 1, -1)
    return tensors


def _head(x: Any, head: int) -> Any:
    """The rows of one head, of a kernel `[D, heads, H]` or a bias `[heads, H]`."""
    return x[:, head].T if x.ndim == 3 else x[head]


def _output(layout: Layout, weight: Any) -> dict[str, Any]:
    """A folded projection is unfolded into itself, of the groups, and a sum over them."""
    if layout.folded is None:
        return {f"{layout.out}.weight": weight}
    names = layout.folded_names
    unit = np.eye(weight.shape[0], dtype=weight.dtype)
    folded = dict(zip(names, split_columns(weight, len(names))))
    return {**folded, f"{layout.out}.weight": np.concatenate([unit] * len(names), axis=1)}


# -- what can be wrong ------------------------------------------------------------------------------------------------


def _check(name: str, layout: Layout, tensors: Mapping[str, Any], heads: int, kv_heads: int) -> int:
    """Names and shapes; returns the head size H."""
    first, blocks = next(iter(layout.weights.items()))
    rows = tensors[first].shape[0] if first in tensors else len(blocks)
    head_dim = rows // len(blocks)
    expected = _expected(layout, tensors, head_dim, heads)
    has_biases = any(bias in tensors for bias in layout.biases)
    optional = {*layout.others, f"{layout.out}.bias", *([] if has_biases else layout.biases)}
    faults = {
        "missing": [tensor for tensor in expected if tensor not in tensors and tensor not in optional],
        "unexpected": [tensor for tensor in tensors if tensor not in expected],
        "misshapen": [x for x in expected if x in tensors and not _fits(tensors[x].shape, expected[x])],
        "not divisible by heads": [first] if rows % len(blocks) else [],
    }
    if any(faults.values()):
        told = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ValueError(
            f"These tensors are no attention layer of layout={name!r} with heads={heads}, kv_heads={kv_heads}. {told}. "
            f"Found {shapes(tensors)}, expected {expected}, where None is any length."
        )
    return head_dim


def _expected(layout: Layout, tensors: Mapping[str, Any], head_dim: int, heads: int) -> dict[str, tuple]:
    """The shape of every tensor that the layout knows."""
    expected: dict[str, tuple] = {name: (len(blocks) * head_dim, None) for name, blocks in layout.weights.items()}
    expected |= {name: (len(blocks) * head_dim,) for name, blocks in layout.biases.items()}
    if layout.out is not None:
        folded = layout.folded_names
        expected |= {name: (None, heads * head_dim // len(folded)) for name in folded}
        width = sum(tensors[name].shape[0] for name in folded if name in tensors)
        expected |= {f"{layout.out}.weight": (None, width or heads * head_dim), f"{layout.out}.bias": (None,)}
    for name, (_, split) in layout.others.items():
        expected[name] = (None,) if split is None else (1, 1, heads * head_dim)
    return expected


def _fits(shape: tuple[int, ...], expected: tuple) -> bool:
    return len(shape) == len(expected) and all(n in (None, m) for m, n in zip(shape, expected))


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}


# -- arrays -----------------------------------------------------------------------------------------------------------


def concatenate(arrays: list[Any], axis: int = 0) -> Any:
    """With numpy for numpy arrays, with JAX for JAX arrays, so that JAX can differentiate a conversion."""
    if len(arrays) == 1:
        return arrays[0]
    return (np if all(isinstance(x, np.ndarray) for x in arrays) else jnp).concatenate(arrays, axis)


def split_columns(weight: Any, parts: int) -> list[Any]:
    width = weight.shape[1] // parts
    return [weight[:, part * width : (part + 1) * width] for part in range(parts)]


def _put(params: Params, where: tuple[str, ...], x: Any) -> None:
    if len(where) == 1:
        params[where[0]] = x
    else:
        params.setdefault(where[0], {})[where[1]] = x
