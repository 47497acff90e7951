"""Weights of one attention layer in every layout."""

from typing import Any

import numpy as np

RNG = np.random.default_rng(0)


def weights(rows: dict[str, int], columns: int = 24, out: str | None = None, width: int = 24, bias: bool = True):
    """Random linear layers, by name, with so many rows."""
    sizes = {name: (count, columns) for name, count in rows.items()} | ({out: (24, width)} if out else {})
    state = {f"{name}.weight": RNG.standard_normal(size) for name, size in sizes.items()}
    return state | ({f"{name}.bias": RNG.standard_normal(size[0]) for name, size in sizes.items()} if bias else {})


NORMS = {f"{norm}.{part}": RNG.standard_normal(24) for norm in ("q_ln", "k_ln") for part in ("weight", "bias")}
KNOTGRASS = {f"{name}.{i}": 4 for name in ("grouped.0.querys", "grouped.1.querys") for i in range(3)}
STATES: dict[str, tuple[str, int, int, dict[str, Any]]] = {  # layout, heads, kv_heads, tensors
    "fused": ("fused", 6, 2, {**weights({"Wqkv": 40}, out="out_proj"), **NORMS}),
    "fused without bias": ("fused", 6, 1, weights({"Wqkv": 32}, out="out_proj", bias=False)),
    "unfused": ("unfused", 6, 2, weights({"Wq": 24, "Wk": 8, "Wv": 8}, out="out_proj")),
    "reused keys": ("unfused_without_keys", 6, 6, weights({"Wq": 24}, out="out_proj")),
    "llama": ("llama", 6, 2, weights({"q_proj": 24, "k_proj": 8, "v_proj": 8}, out="o_proj")),
    "falcon 40B": ("falcon", 6, 2, weights({"query_key_value": 40}, out="dense")),
    "falcon 7B": ("falcon", 6, 1, weights({"query_key_value": 32}, out="dense", bias=False)),
    "chatglm": ("chatglm", 6, 2, weights({"query_key_value": 40}, out="dense")),
    "bigcode": ("gpt_bigcode", 6, 6, weights({"c_attn": 72}, out="c_proj")),
    "bigcode multi-query": ("gpt_bigcode", 6, 1, weights({"c_attn": 32}, out="c_proj")),
    "nanogpt": ("nanogpt", 6, 6, weights({"c_attn": 72}, out="c_proj", bias=False)),
    "gpt2": ("gpt2", 6, 6, {n: x.T for n, x in weights({"c_attn": 72}, out="c_proj").items()}),
    "bert": ("bert", 6, 6, weights({f"self.{n}": 24 for n in ("query", "key", "value")}, out="output.dense")),
    "lucidrains": ("lucidrains", 6, 6, weights({"to_q": 24, "to_kv": 48}, out="to_out", bias=False)),
    "one head": ("knotgrass", 1, 1, weights({"query": 4, "key": 4, "value": 4})),
    "knotgrass multi-head": (
        "knotgrass_multihead",
        2,
        2,
        weights({f"multihead.{i}.{n}": 4 for i in range(2) for n in ("query", "key", "value")})
        | weights({}, out="proj", width=8, bias=False),
    ),
    "knotgrass multi-query": (
        "knotgrass_multiquery",
        3,
        1,
        weights({"querys.0": 4, "querys.1": 4, "querys.2": 4, "key": 4, "value": 4})
        | weights({}, out="proj", width=12, bias=False),
    ),
    "torch": (
        "torch",
        6,
        6,
        {
            "in_proj_weight": RNG.standard_normal((72, 24)),
            "in_proj_bias": RNG.standard_normal(72),
            "bias_k": RNG.standard_normal((1, 1, 24)),
            "bias_v": RNG.standard_normal((1, 1, 24)),
            **weights({}, out="out_proj"),
        },
    ),
    "torch with kdim": (
        "torch_kdim",
        6,
        6,
        {
            "q_proj_weight": RNG.standard_normal((24, 24)),
            "k_proj_weight": RNG.standard_normal((24, 10)),
            "v_proj_weight": RNG.standard_normal((24, 6)),
            "in_proj_bias": RNG.standard_normal(72),
            **weights({}, out="out_proj"),
        },
    ),
}
AMBIGUOUS = ("falcon 40B", "chatglm", "bigcode", "nanogpt")  # names and shapes do not tell their layouts
