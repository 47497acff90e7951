"""The rotary positions of a Hugging Face `config.json`."""

from collections.abc import Callable, Mapping
from typing import Any

from mqa_jax.positions import LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling

# For each `rope_type`: the class that scales the frequencies, its required fields, and its optional fields.
CONTEXT = "original_max_position_embeddings"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", CONTEXT)
YARN = ("factor", CONTEXT)
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
SCALINGS: dict[str, tuple[Callable[..., Scaling] | None, tuple[str, ...], tuple[str, ...]]] = {
    "default": (None, (), ()),
    "linear": (LinearScaling, ("factor",), ()),
    "llama3": (Llama3Scaling, LLAMA3, ()),
    "yarn": (YarnScaling, YARN, YARN_OPTIONS),
}


def rope_of(config: Mapping[str, Any]) -> Rope:
    """The rotary embedding, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    if new and old and new != old:
        raise ValueError(f"These are one field: rope_parameters={new!r}, rope_scaling={old!r}.")
    rope = {"rope_theta": config.get("rope_theta"), **(new or old or {})}
    theta, kind = rope.pop("rope_theta") or 10_000.0, rope.pop("rope_type", rope.get("type", "default"))
    if kind not in SCALINGS:
        raise NotImplementedError(f"RoPE scaling is one of {list(SCALINGS)}: rope_type={kind!r}.")
    scaling, required, optional = SCALINGS[kind]
    if CONTEXT in required:
        rope[CONTEXT] = config.get(CONTEXT) or rope.get(CONTEXT) or config.get("max_position_embeddings")
    given = {name: x for name, x in rope.items() if x is not None}
    neutral = {"type": rope.get("type"), "partial_rotary_factor": 1}
    wrong = {name: x for name, x in given.items() if name not in required + optional and x != neutral.get(name)}
    if wrong:
        raise NotImplementedError(
            f"RoPE of rope_type={kind!r} does not support {wrong}: its fields are {[*required, *optional]}."
        )
    missing = [name for name in required if name not in given]
    if missing:
        raise ValueError(f"RoPE of rope_type={kind!r} needs {missing}: found {given}.")
    if scaling is None:
        return Rope(theta=theta)
    return Rope(theta=theta, scaling=scaling(**{name: given[name] for name in required + optional if name in given}))
