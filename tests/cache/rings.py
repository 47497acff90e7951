"""A text longer than a ring buffer, and what modules with one make of it."""

from typing import Any

import jax
import jax.numpy as jnp
from caches import RNG, new_cache, step

import mqa_jax
from mqa_jax.cache import layout

WINDOW = (6, 0)
SLOTS = layout.ring_slots(WINDOW[0])
LENGTH = 3 * SLOTS + 5
TEXT = jax.random.normal(RNG, (3, LENGTH, 24))
EIGHT_BITS = "int8", "float8_e4m3fn"
RING: dict[str, Any] = dict(cache_layout="ring", local_window_size=WINDOW)
# Each with its arguments of a call, which span all positions.
OPTIONS: dict[str, dict[str, Any]] = {
    "positions": dict(rope=mqa_jax.Rope(), alibi=True, attn_temperature_tuning=mqa_jax.TemperatureTuning()),
    "scores": dict(qk_gn=True, logits_soft_cap=1.0, softmax_scale=0.4, sinks=True, add_zero_attn=True),
    "learned key": dict(add_bias_kv=True, kv_heads=6, clip_qkv=1.0),
    "one head": dict(kv_heads=1, local_window_size=(6, 2), causal=False),
}
PAIRS: dict[str, Any] = {
    "mask": jax.random.normal(RNG, (3, 1, LENGTH, LENGTH)) > -1,
    "mask of keys": jax.random.normal(RNG, (3, LENGTH)) > -1,
    "bias": jax.random.normal(RNG, (6, LENGTH, LENGTH)),
    "bias of keys": jax.random.normal(RNG, (3, 1, 1, LENGTH)),
    "bias of queries": jax.random.normal(RNG, (6, LENGTH, 1)),
}
SCHEDULE = (1, 20, 5, 1, 1, 37, 3, 1, 1, 1)  # within the ring and past it; over its end in both


def cached(module, params, schedule=SCHEDULE, cache=None, x=TEXT, arguments=lambda start, stop: {}):
    """Outputs of these chunks one after the other, and the last cache."""
    outputs, start = [], 0
    cache = new_cache(module, max_length=LENGTH) if cache is None else cache
    for length in schedule:
        more = arguments(start, start + length)
        out, cache = step(module, params, cache, x[:, start : start + length], **more)
        outputs.append(out)
        start += length
    return jnp.concatenate(outputs, 1), cache


def rows_of(name, start, stop):
    pairs = PAIRS[name]
    rows = pairs.shape[-2] if "of keys" not in name else 1
    return {name.split()[0]: pairs if rows == 1 else pairs[..., start:stop, :]}
