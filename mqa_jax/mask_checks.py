"""Checks of what hides pairs of queries and keys: the arguments of an attention call that become a `Mask`."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from mqa_jax.arguments import STATIC, array, flag, in_32_bits, integers, may_exceed_32_bits, of_batch, whole_number
from mqa_jax.function_checks import checked_function
from mqa_jax.masks import MAX_INT32, MIN_INT32, Mask, Ring

Call = SimpleNamespace  # the arguments of `mqa_jax.dot_product_attention` by name, as the caller passed them


def checked_mask(call: Call, batch: tuple, pairs: tuple, dtype: DTypeLike, parts: tuple) -> Mask:
    rows, columns = pairs[-2] * parts[0], pairs[-1]
    key_lengths, ring = _key_lengths(call, batch, columns)
    query_segments, key_segments = _segments(call, batch, pairs[-2], columns // parts[1])
    return Mask(
        query_offset=_query_offset(call.query_offset, batch, rows),
        allowed=pair_array("mask", call.mask, pairs, jnp.bool_),
        query_lengths=_lengths("query_seq_lengths", call.query_seq_lengths, batch, rows),
        key_lengths=key_lengths,
        query_segments=query_segments,
        key_segments=key_segments,
        function=checked_function("mask_fn", call.mask_fn, batch, dtype),
        ring=ring,
        is_causal=flag("is_causal", call.is_causal),
        window=checked_window(call.local_window_size),
    )


def _lengths(name: str, x: ArrayLike | None, batch: tuple, longest: int) -> Array | None:
    if x is None:
        return None
    rule, remedy = "lie between 0 and the length of the array", f"length={longest}"
    return in_32_bits(name, integers(name, of_batch(x, batch, 0), batch), rule, remedy, 0, longest)


def _key_lengths(call: Call, batch: tuple, columns: int) -> tuple[Array | None, Ring | None]:
    """The number of keys that are not padding, and the ring buffer, if they are in one."""
    name, lengths = "key_value_ring_lengths", call.key_value_ring_lengths
    if lengths is None:
        return _lengths("key_value_seq_lengths", call.key_value_seq_lengths, batch, columns), None
    if call.key_value_seq_lengths is not None:
        raise ValueError(
            "key_value_ring_lengths already determines the number of keys, so key_value_seq_lengths must be None: "
            f"key_value_ring_lengths={lengths}, key_value_seq_lengths={call.key_value_seq_lengths}."
        )
    rule, remedy = "not be negative, and fit 32 bits", "which counts all tokens so far"
    lengths = in_32_bits(name, integers(name, of_batch(lengths, batch, 0), batch), rule, remedy, 0)
    return jnp.minimum(lengths, columns), Ring(lengths, columns)


def _segments(call: Call, batch: tuple, *lengths: int) -> tuple[Array | None, Array | None]:
    """int32; traced ids of a wider dtype, whose values are not known, are compared in their own dtype."""
    names = "query_segment_ids", "key_value_segment_ids"
    query, key = (of_batch(getattr(call, name), batch, 1) for name in names)
    if query is None and key is None:
        return None, None
    if query is None or key is None:
        raise ValueError(
            "query_segment_ids and key_value_segment_ids go together: "
            f"query_segment_ids is {'' if query is None else 'not '}None, "
            f"key_value_segment_ids is {'' if key is None else 'not '}None. "
            "In self-attention, pass the same array twice."
        )
    query, key = (integers(name, x, (*batch, n)) for name, x, n in zip(names, (query, key), lengths))
    if any(isinstance(x, jax.core.Tracer) and may_exceed_32_bits(x) for x in (query, key)):
        if query.dtype != key.dtype:
            raise ValueError(
                "Segment ids that may not fit 32 bits must have one dtype: "
                f"{query.dtype=!s}, {key.dtype=!s}. Cast both with .astype(jnp.int32)."
            )
        return jnp.asarray(query), jnp.asarray(key)
    rule, remedy = "fit 32 bits", "of which only equality counts: number the segments 0, 1, 2, ..."
    return in_32_bits(names[0], query, rule, remedy), in_32_bits(names[1], key, rule, remedy)


def _query_offset(x: ArrayLike, batch: tuple, rows: int) -> Array | None:
    """int32 with the batch axes, or as many axes of size 1; None for a Python 0."""
    if type(x) is int and x == 0:
        return None
    offset = integers("query_offset", of_batch(x, batch, 0), (), batch)
    highest = MAX_INT32 + 1 - max(rows, 1) if isinstance(rows, int) else MAX_INT32  # else a symbol of `jax.export`
    rule = f"leave the positions of all queries in 32 bits, from {MIN_INT32} to {highest}"
    offset = in_32_bits("query_offset", offset, rule, "where the first key is at 0", highest=highest)
    return offset.reshape(offset.shape or (1,) * len(batch))


def checked_window(size: int | tuple[int, int] | None) -> tuple[int | None, int | None] | None:
    """(left, right), where None means no limit: -1, or any number from MAX_INT32 on."""
    if size is None:
        return None
    numbers = [whole_number(n) for n in (size if isinstance(size, tuple | list) else (size, size))]
    if len(numbers) != 2 or any(n is None or n < -1 for n in numbers):
        raise ValueError(
            f"local_window_size must be an int or (left, right), not negative, {STATIC}: local_window_size={size!r}. "
            "It counts neighbours on each side; -1 is no limit there, None is no window."
        )
    left, right = (None if n == -1 or n >= MAX_INT32 else n for n in numbers)  # type: ignore[operator]
    return None if left is None and right is None else (left, right)


OTHER_KINDS = {  # what the caller may have meant instead, by dtype
    "mask": {
        jnp.integer: "A mask of 0 and 1, as tokenizers make it, is mask.astype(bool), True = may attend.",
        jnp.floating: "A mask of 0 and 1 is mask.astype(bool), True = may attend; one that is added to the scores, "
        "0 and -inf, goes to bias=.",
    },
    "bias": {
        jnp.bool_: "A boolean mask goes to mask=.",
        jnp.integer: "A mask of 0 and 1 goes to mask=, as bool: .astype(bool); numbers to add are bias.astype(float).",
    },
}


def pair_array(name: str, x: ArrayLike | None, pairs: tuple, kind: Any) -> Array | None:
    """An array that broadcasts to `[..., N, T, S]`, with missing leading axes filled in."""
    if x is None:
        return None
    x = array(name, of_batch(x, pairs[:-3], 3))
    if not jnp.issubdtype(x.dtype, kind):
        hints = [hint for other, hint in OTHER_KINDS[name].items() if jnp.issubdtype(x.dtype, other)]
        hint = "".join(hints) or f"Cast it with .astype({'bool' if kind is jnp.bool_ else 'float'})."
        raise ValueError(f"{name} must be {kind.__name__}: {name}.dtype={x.dtype!s}. {hint}")
    if x.ndim > len(pairs) or any(n not in (1, whole) for n, whole in zip(x.shape[::-1], pairs[::-1])):
        raise ValueError(
            f"{name} must broadcast to [..., N, T, S]: {name}.shape={x.shape}, [..., N, T, S]={pairs}. "
            f"Give axes that are shared size 1."
        )
    return x.reshape((1,) * (len(pairs) - x.ndim) + x.shape)
