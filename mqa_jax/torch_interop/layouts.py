"""The layouts of weights in PyTorch attention layers: one table for conversions in both directions.

A layout is, for each tensor of a state dict, the list of heads that its rows belong to, in order. From it follow the
parameters of a Flax module, the state dict of these parameters (bitwise, since nothing is computed), and all shapes.

    name          rows of its tensors                                             layers
    fused         Wqkv: q of all heads | k of all | v of all                      mqa, zeta, llm-foundry, MPT, FlashMHA
    unfused       Wq, Wk, Wv; with reused keys Wq alone                           llm-foundry
    torch         in_proj_weight: q | k | v                                       torch.nn.MultiheadAttention
    torch_kdim    q_proj_weight, k_proj_weight, v_proj_weight; in_proj_bias       the same with kdim or vdim
    llama         q_proj, k_proj, v_proj, o_proj                                  Llama, Mistral, Qwen2, SmolLM
    falcon        query_key_value: for each k/v head its q heads, then k, then v  Falcon 7B, 40B, with MHA; NeoX
    chatglm       query_key_value: q of all heads | k of all | v of all           ChatGLM 2 and 3
    gpt_bigcode   c_attn: for each k/v head its q heads, then k, then v           GPTBigCode (StarCoder), MQA and MHA
    nanogpt       c_attn: q of all heads | k of all | v of all                    nanoGPT, Qwen 1
    gpt2          the same in `Conv1D`, whose weights are [in, out]               GPT-2
    bert          self.query, self.key, self.value, output.dense                  BERT, RoBERTa, MiniLM
    lucidrains    to_q; to_kv: k of all heads | v of all                          FlashMHA's other FlashAttention
    knotgrass     query, key, value of one head, or one of these for each head    knotgrass's four classes
"""

import collections
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Params = dict[str, Any]
Block = tuple[str, int]  # the rows of one head: "query", "key" or "value", and the number of the head
Rows = Mapping[str, list[Block]]


@dataclass(frozen=True)
class Layout:
    """One row of the table above, for given numbers of heads.

    Attributes:
      weights, biases: tensor -> heads of its rows. All weights are required; either all biases are present, or none.
      out: name of the output projection, None without one; its weight is `[D, N * H]`.
      folded: name, with the group's number, of each group's output projection before that of all groups, or None.
      others: tensor -> its path in the parameters, and the number of heads it is split into (None: not split).
      transposed: weights are `[in, out]`.
    """

    weights: Rows
    biases: Rows
    out: str | None
    folded: str | None = None
    others: Mapping[str, tuple[tuple[str, ...], int | None]] = field(default_factory=dict)
    transposed: bool = False

    @property
    def heads(self) -> dict[str, int]:
        """The number of heads of each kind."""
        counts = collections.Counter(kind for blocks in self.weights.values() for kind, _ in blocks)
        return dict(counts)

    @property
    def folded_names(self) -> list[str]:
        """The name of each group's output projection."""
        groups = sum(kind == "key" for blocks in self.weights.values() for kind, _ in blocks)
        return [] if self.folded is None else [self.folded.format(group) for group in range(groups)]

    @property
    def names(self) -> set[str]:
        """The names of all tensors that the layout may have."""
        outer = [] if self.out is None else [f"{self.out}.weight", f"{self.out}.bias"]
        return {*self.weights, *self.biases, *self.others, *self.folded_names, *outer}


def _all(kind: str, count: int) -> list[Block]:
    return [(kind, head) for head in range(count)]


def _linear(rows: Rows, out: str | None, **more: Any) -> Layout:
    """The layout of linear layers, each with a `.weight` and optionally a `.bias`."""
    suffixed = lambda suffix: {f"{name}.{suffix}": blocks for name, blocks in rows.items()}
    return Layout(suffixed("weight"), suffixed("bias"), out, **more)


NORMS = {
    f"{norm}.{tensor}": ((norm, parameter), None)
    for norm in ("q_ln", "k_ln")
    for tensor, parameter in (("weight", "scale"), ("bias", "bias"))
}


def _fused(fused: str, out: str, **more: Any) -> Callable[[int, int], Layout]:
    def layout(heads: int, kv_heads: int) -> Layout:
        rows = [*_all("query", heads), *_all("key", kv_heads), *_all("value", kv_heads)]
        return _linear({fused: rows}, out, **more)

    return layout


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
    """Also for MQA, with one group of all heads, and MHA, with groups of one head."""

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


# For each layout, a tensor whose name identifies it. If several of these tensors are present, the first one counts; if
# several layouts have the same tensor, the shapes or the caller select one.
LAYOUTS: dict[str, tuple[str, Callable[[int, int], Layout]]] = {
    "fused": ("Wqkv.weight", _fused("Wqkv", "out_proj", others=NORMS)),
    "unfused": ("Wk.weight", _unfused),
    "unfused_without_keys": ("Wq.weight", _unfused_without_keys),
    "torch": ("in_proj_weight", _torch),
    "torch_kdim": ("q_proj_weight", _torch_kdim),
    "llama": ("q_proj.weight", _separate("q_proj", "k_proj", "v_proj", "o_proj")),
    "falcon": ("query_key_value.weight", _by_group("query_key_value", "dense")),
    "chatglm": ("query_key_value.weight", _fused("query_key_value", "dense")),
    "gpt_bigcode": ("c_attn.weight", _by_group("c_attn", "c_proj")),
    "nanogpt": ("c_attn.weight", _fused("c_attn", "c_proj")),
    "gpt2": ("c_attn.weight", _fused("c_attn", "c_proj", transposed=True)),
    "bert": ("self.query.weight", _separate("self.query", "self.key", "self.value", "output.dense")),
    "lucidrains": ("to_q.weight", _lucidrains),
    "knotgrass_multihead": ("multihead.0.query.weight", _knotgrass_multihead),
    "knotgrass_multiquery": ("querys.0.weight", _knotgrass_multiquery),
    "knotgrass_grouped": ("grouped.0.key.weight", _knotgrass_grouped),
    "knotgrass": ("query.weight", _knotgrass),
}


# Tensors in some files that are not weights of attention: RoPE frequencies, causal masks, and BERT's norm after it.
IGNORED = re.compile(r"rotary_emb\.inv_freq|(attn\.)?masked_bias|output\.LayerNorm\.(weight|bias)")


def is_ignored(name: str, x: Any) -> bool:
    """Whether a tensor is not part of the attention layer; GPT-2's and nanoGPT's causal mask is called `bias`."""
    return bool(IGNORED.fullmatch(name)) or (name == "bias" and x.ndim == 4)


def find(name: str | None, tensors: Mapping[str, Any], heads: int, kv_heads: int) -> tuple[str, Layout]:
    """The layout of this name, or the one recognised by the tensors."""
    name = _recognised(tensors, heads, kv_heads) if name is None else name
    if name not in LAYOUTS:
        raise ValueError(f"Unknown layout={name!r}: use one of {list(LAYOUTS)}, or None to have it recognised.")
    layout = LAYOUTS[name][1](heads, kv_heads)
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    if any(count != counts[kind] for kind, count in layout.heads.items()):
        raise ValueError(
            f"layout={name!r} has these numbers of heads: {layout.heads}; given were heads={heads}, "
            f"kv_heads={kv_heads}."
        )
    return name, layout


def _recognised(tensors: Mapping[str, Any], heads: int, kv_heads: int) -> str:
    marker = next((marker for marker, _ in LAYOUTS.values() if marker in tensors), None)
    if marker is None:
        some = shapes(dict(itertools.islice(tensors.items(), 20)))
        raise ValueError(
            f"No known attention layout: found {some}{' and more' if len(tensors) > 20 else ''}; expected one of "
            f"{sorted({marker for marker, _ in LAYOUTS.values()})}. Is the prefix right?"
        )
    layouts = {name: make(heads, kv_heads) for name, (found, make) in LAYOUTS.items() if found == marker}
    fitting = {name: x for name, x in layouts.items() if _has_shapes_of(x, tensors, heads)}
    first = next(iter(fitting or layouts))
    if any(x != fitting[first] for x in fitting.values()):
        rows = {name: _order(x.weights[marker], heads // kv_heads + 3) for name, x in fitting.items()}
        raise ValueError(
            f"Several layouts have a {marker} of shape {tuple(tensors[marker].shape)}, with rows of heads in another "
            f"order: {rows}. Say which, with heads={heads}, kv_heads={kv_heads}: "
            f"layout={' or '.join(map(repr, rows))}."
        )
    return first


def _order(blocks: list[Block], count: int) -> str:
    return " ".join(f"{kind[0]}{head}" for kind, head in blocks[:count]) + " ..."


def knotgrass_settings(names: Iterable[str]) -> dict[str, Any]:
    """Settings from the names: knotgrass's classes have a tensor for each head. None of them is causal."""
    names = list(names)
    heads, kv_heads = (sum(bool(kind.fullmatch(name)) for name in names) for kind in (KNOTGRASS_QUERY, KNOTGRASS_KEY))
    return dict(heads=heads, kv_heads=kv_heads, causal=False) if heads else {}


# -- shapes ------------------------------------------------------------------------------------------------------------


def _has_shapes_of(layout: Layout, tensors: Mapping[str, Any], heads: int) -> bool:
    tensors = upright(layout, tensors)
    known = expected(layout, tensors, head_dim_of(layout, tensors), heads)
    return all(fits(tensors[name].shape, shape) for name, shape in known.items() if name in tensors)


def upright(layout: Layout, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transposes the weights of a transposed layout, from and to `[out, in]`."""
    if not layout.transposed:
        return tensors
    return {name: x.T if name.endswith(".weight") else x for name, x in tensors.items()}


def head_dim_of(layout: Layout, tensors: Mapping[str, Any]) -> int:
    first, blocks = next(iter(layout.weights.items()))
    return tensors[first].shape[0] // len(blocks) if first in tensors else 1


def expected(layout: Layout, tensors: Mapping[str, Any], head_dim: int, heads: int) -> dict[str, tuple]:
    """The shape of every tensor of the layout; None is any length."""
    known: dict[str, tuple] = {name: (len(blocks) * head_dim, None) for name, blocks in layout.weights.items()}
    known |= {name: (len(blocks) * head_dim,) for name, blocks in layout.biases.items()}
    if layout.out is not None:
        folded = layout.folded_names
        known |= {name: (None, heads * head_dim // len(folded)) for name in folded}
        width = sum(tensors[name].shape[0] for name in folded if name in tensors)
        known |= {f"{layout.out}.weight": (None, width or heads * head_dim), f"{layout.out}.bias": (None,)}
    for name, (_, split) in layout.others.items():
        known[name] = (None,) if split is None else (1, 1, heads * head_dim)
    return known


def fits(shape: tuple[int, ...], expected: tuple) -> bool:
    return len(shape) == len(expected) and all(n in (None, m) for m, n in zip(shape, expected))


def shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in tensors.items()}
