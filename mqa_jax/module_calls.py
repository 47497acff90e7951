"""What a call of an attention module may look like, and how upstream's masks and biases become the function's."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from mqa_jax.cache_append import Keys


class Call(NamedTuple):
    """The arguments that depend on each other."""

    x: Array
    past_key_value: Any
    inputs_k: ArrayLike | None
    prev_layer_key_value: Any
    segment_ids: ArrayLike | None
    causal: bool
    cached: bool

    def check(self) -> None:
        x, past = self.x, self.past_key_value
        if x.ndim < 2:
            raise ValueError(f"x must be [..., T, D]: x.shape={x.shape}.")
        if self.cached and x.ndim != 3:
            raise ValueError(f"With a cache x must be [batch, T, D]: x.shape={x.shape}.")
        sources = {
            "a cache collection": self.cached,
            "past_key_value": past is not None and len(past) > 0,
            "inputs_k": self.inputs_k is not None,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) > 1 or (self.prev_layer_key_value is not None and given):
            given += ["prev_layer_key_value"] if self.prev_layer_key_value is not None else []
            raise ValueError(f"Only one of these can say where earlier keys and values are, got {' and '.join(given)}.")
        for name, pair in (("past_key_value", past), ("prev_layer_key_value", self.prev_layer_key_value)):
            _check_key_value(name, pair, x)
        if self.segment_ids is not None and (given or self.prev_layer_key_value is not None):
            raise ValueError(
                "segment_ids separate packed sequences in self-attention over x alone; "
                f"with {' and '.join(given) or 'prev_layer_key_value'} pass a mask."
            )
        if self.inputs_k is not None and self.causal and jnp.shape(self.inputs_k)[-2] != x.shape[-2]:
            raise ValueError(
                "Causal attention to inputs_k of another length has no agreed meaning: "
                f"x.shape={x.shape}, inputs_k.shape={jnp.shape(self.inputs_k)}. Pass causal=False."
            )

    @property
    def query_offset(self) -> int:
        """Position of the first query, without a cache: behind what is past; at the end of another layer's keys."""
        if self.past_key_value:
            return self.past_key_value[0].shape[-3]
        if self.prev_layer_key_value is not None:
            return self.prev_layer_key_value[0].shape[-3] - self.x.shape[-2]
        return 0


def _check_key_value(name: str, pair: Any, x: Array) -> None:
    """`()` or None, or a pair [..., S, K, H]."""
    if pair is None or len(pair) == 0:
        return
    shapes = [jnp.shape(array) for array in pair]
    if len(pair) != 2 or any(len(shape) != x.ndim + 1 for shape in shapes):
        raise ValueError(
            f"{name} must be (key, value), each [..., length, kv_heads, head_dim] with the leading axes of x: "
            f"shapes={shapes}, x.shape={x.shape}. mqa_jax.torch_interop converts upstream's layouts."
        )


def pair_mask(mask: ArrayLike | None, attention_mask: ArrayLike | None, leading_axes: int) -> Array | None:
    """`[..., S]` (keys), `[..., T, S]` or `[..., N, T, S]`, bool, as `[..., N, T, S]`; the two are one argument."""
    if mask is not None and attention_mask is not None:
        raise ValueError("mask and attention_mask are two names of one argument: pass one.")
    mask = attention_mask if mask is None else mask
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    extra = mask.ndim - leading_axes
    if extra == 1:
        return mask[..., None, None, :]
    if extra == 2:
        return mask[..., None, :, :]
    if extra == 3:
        return mask
    raise ValueError(
        f"mask must be [..., S], [..., T, S] or [..., N, T, S], where ... is {leading_axes} axes of x: "
        f"mask.shape={mask.shape}."
    )


def pair_bias(bias: ArrayLike | None) -> Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    if bias.ndim < 2:
        raise ValueError(f"bias must be [..., N, T, S]: bias.shape={bias.shape}. Give axes that are shared size 1.")
    return bias


def columns_of(*pairs: Array | None) -> int | None:
    """The shortest key axis of masks and biases that have one."""
    return min((x.shape[-1] for x in pairs if x is not None and x.shape[-1] > 1), default=None)


def for_keys(pairs: Array | None, keys: Keys, rows: int | None = None) -> Array | None:
    """A mask or bias by position, for keys as they lie.

    `rows`: of one that was made for a longer text, the part for the last queries and keys (upstream's way).
    """
    if pairs is None:
        return None
    if rows is not None:
        pairs = pairs[..., max(0, pairs.shape[-2] - rows) :, :]
    if keys.positions is None:
        first = 0 if rows is None else max(0, pairs.shape[-1] - keys.key.shape[-3])
        return pairs[..., first:]
    if pairs.shape[-1] == 1:
        return pairs
    pairs = pairs.reshape((1,) * (4 - pairs.ndim) + pairs.shape)
    existing = jnp.clip(keys.positions, 0, pairs.shape[-1] - 1)  # other slots are hidden, or the row is worthless
    return jnp.take_along_axis(pairs, existing[:, None, None], axis=-1)


def check_weights(keys: Keys) -> None:
    if keys.positions is not None:
        raise NotImplementedError(
            "needs_weights wants keys in the order of their positions, which a ring buffer has not: "
            "cache_layout='ring'. Use cache_layout='static'."
        )
