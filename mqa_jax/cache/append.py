"""How new tokens get into a cache (`mqa_jax.cache`), and what the queries of the same call attend to."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Real

from mqa_jax import masks, quantization
from mqa_jax.cache import layout
from mqa_jax.cache.checks import FULL, MAX_INT32, SPOILED, unchecked, within
from mqa_jax.cache.layout import INDEX, KEY, KEY_SCALE, OTHER_CALLS, RING_INDEX, VALUE, VALUE_SCALE
from mqa_jax.shapes import positions

Contents = dict[str, Array]  # by the names of `layout`, each [B, positions, K, ...]


class Keys(NamedTuple):
    """What the queries of a call attend to, with a cache or without.

    Attributes:
      key, value, key_scale, value_scale: as in `dot_product_attention`.
      lengths: int32, how many keys there are; None is all. `in_ring`: how many went through the ring.
      query_offset: place of the first query among the keys.
      positions: int32 `[B, S]`, of keys whose position is not their index; None: it is.
      start: with a cache, the position of the first query.
      spoiled: bool `[B]`, rows whose result is worthless: tokens did not fit, or something was out of range.
      parts: these keys are one of so many equal parts, the others of which are on other devices.
    """

    key: Real[Array, "... S K H"]
    value: Real[Array, "... S K H"]
    key_scale: Float[Array, "B S K"] | None = None
    value_scale: Float[Array, "B S K"] | None = None
    lengths: Int[Array, "..."] | None = None
    in_ring: bool = False
    query_offset: int | Array = 0
    positions: Int[Array, "B S"] | None = None
    start: Int[Array, " B"] | None = None
    spoiled: Bool[Array, "..."] | None = None
    parts: int = 1

    @property
    def columns(self) -> int:
        """How many keys there are on all devices."""
        return self.key.shape[-3] * self.parts

    @classmethod
    def cached(cls, contents: Contents, dtype: DTypeLike, **fields: Any) -> "Keys":
        """`dtype` is the queries', which keys that are not quantized have to have."""
        if KEY_SCALE in contents:
            return cls(contents[KEY], contents[VALUE], contents[KEY_SCALE], contents[VALUE_SCALE], **fields)
        return cls(contents[KEY].astype(dtype), contents[VALUE].astype(dtype), **fields)

    def options(self) -> dict[str, Any]:
        """For `dot_product_attention`."""
        lengths = "key_value_ring_lengths" if self.in_ring else "key_value_seq_lengths"
        scales = {"key_scale": self.key_scale, "value_scale": self.value_scale}
        return {"query_offset": self.query_offset, lengths: self.lengths, **scales}


class Lengths(NamedTuple):
    """How many of the T tokens of each row count, and in which rows that was no possible number."""

    tokens: Int[Array, "..."]
    wrong: Bool[Array, "..."]


class New(NamedTuple):
    """New tokens: what is written, T of each row, of which those from position `start` to `stop` count."""

    contents: Contents
    start: Int[Array, " B"]
    stop: Int[Array, " B"]
    dtype: DTypeLike  # in which the module computes


def write(old: Array, new: Array, start: Int[Array, " B"], fits: Bool[Array, " B"]) -> Array:
    """A static cache, or a part of one, with new tokens, those from position `start` on, in the rows where they fit.

    Row by row; XLA does it in place where the old array is donated or a loop carry, on the device that has the row. Of
    the tokens those are written whose position is in the array. Padding may overhang its end even where tokens fit.
    """
    return unchecked(_write_rows, old, new, start, fits)


class Slots(NamedTuple):
    """Where the positions of a static cache are: all in its arrays, unless devices share them.

    Attributes:
      parts: the arrays that `append` is given are one of so many equal parts.
      write: what is called as `write` is, with each array, new tokens, the position of the first, and where they fit.
    """

    parts: int = 1
    write: Callable[[Array, Array, Int[Array, " B"], Bool[Array, " B"]], Array] = write


ALL_HERE = Slots()


def append(
    cache: Mapping[str, Any],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    lengths: Lengths | None,
    *,
    window: tuple[int | None, int | None] | None = None,
    limits: Sequence[tuple[int, str]] = (),
    slots: Slots = ALL_HERE,
) -> tuple[dict[str, Any], Keys]:
    """Writes new keys and values behind what is there; returns the new cache, and what to attend to.

    Of the caches for several calls the one that was written goes behind the others.

    Too many tokens for a row are never clamped or dropped quietly: with concrete arrays a `ValueError`; under jit a
    check that `checkify` can see, nothing written to that row, and `spoiled` set.

    Args:
      lengths: how many of the T are tokens; the rest is padding, which the next call overwrites. None is all.
      window: of the module. A ring buffer needs one.
      limits: how many positions the masks and biases of this call reach, and what to say where that is too few.
      slots: of a static cache.
    """
    others = cache.get(OTHER_CALLS, ())
    cache = {name: x for name, x in cache.items() if name != OTHER_CALLS}
    layout.check_format(cache)
    _check_shape(cache, key)
    start, spoiled = within(layout.index_of(cache), 0, MAX_INT32, SPOILED)
    count = jnp.full(key.shape[0], key.shape[1], jnp.int32)
    if lengths is not None:
        count, spoiled = lengths.tokens, spoiled | lengths.wrong
    start, count = jnp.where(spoiled, 0, start), jnp.where(spoiled, 0, count)
    in_ring = RING_INDEX in cache
    length = cache[KEY].shape[1] * slots.parts
    stop, full = within(start + count, 0, MAX_INT32 if in_ring else length, FULL)
    new = New(_contents(cache, key, value), start, stop, key.dtype)
    if not in_ring:
        contents, keys = _into_static(cache, new, ~(full | spoiled), slots)
    elif key.shape[1] <= length - _window_left(cache, window):
        # All that the first query sees is still there once the last token is written.
        contents, keys = _into_ring(cache, new)
    else:
        contents, keys = _past_ring(cache, new)
    short = [within(stop, 0, limit, message)[1] for limit, message in limits]
    index = {RING_INDEX if in_ring else INDEX: jnp.where(spoiled, -1, stop)}
    keys = keys._replace(start=start, spoiled=functools.reduce(jnp.logical_or, short, spoiled | full))
    return _behind({**contents, **index}, others), keys


def _behind(written: Contents, others: Sequence[Contents]) -> dict[str, Any]:
    if not others:
        return written
    following, *rest = others
    return {**following, OTHER_CALLS: (*rest, written)}


# -- three ways -------------------------------------------------------------------------------------------------------


def _into_static(cache: Mapping[str, Array], new: New, fits: Bool[Array, " B"], slots: Slots) -> tuple[Contents, Keys]:
    contents = {name: slots.write(cache[name], x, new.start, fits) for name, x in new.contents.items()}
    fields: dict[str, Any] = dict(lengths=new.stop, query_offset=new.start, parts=slots.parts)
    return contents, Keys.cached(contents, new.dtype, **fields)


def _into_ring(cache: Mapping[str, Array], new: New) -> tuple[Contents, Keys]:
    """The ring is written first and then read in place, as slots in no order."""
    slots = cache[KEY].shape[1]
    position = jnp.maximum(new.start, 0)[:, None] + positions(new.contents[KEY].shape[1])[None]
    at, is_token = lax.rem(position, jnp.int32(slots)), position < new.stop[:, None]
    contents = {name: unchecked(_write_ring, cache[name], x, at, is_token) for name, x in new.contents.items()}
    held = masks.ring_positions(positions(slots)[None], new.stop[:, None], slots)
    fields: dict[str, Any] = dict(lengths=new.stop, in_ring=True, query_offset=new.start, positions=held)
    return contents, Keys.cached(contents, new.dtype, **fields)


def _past_ring(cache: Mapping[str, Array], new: New) -> tuple[Contents, Keys]:
    """More tokens than a ring can take before its oldest are read: they are put in a line behind what it holds.

    Two copies of a window, beside which so many new tokens count little. Keys are then at index position - first.
    """
    slots, tokens = cache[KEY].shape[1], new.contents[KEY].shape[1]
    held = jnp.minimum(new.start, slots)
    first = new.start - held
    in_line = lax.rem(first[:, None] + positions(slots)[None], jnp.int32(slots))
    line = {
        name: write(_padded(_gather(cache[name], in_line), tokens), x, held, jnp.ones_like(held, bool))
        for name, x in new.contents.items()
    }
    in_ring = masks.ring_positions(positions(slots)[None], new.stop[:, None], slots) - first[:, None]
    contents = {name: _gather(x, in_ring) for name, x in line.items()}
    fields = dict(lengths=held + new.stop - new.start, query_offset=held)
    return contents, Keys.cached(line, new.dtype, positions=first[:, None] + positions(slots + tokens)[None], **fields)


# -- their parts ------------------------------------------------------------------------------------------------------


def _contents(cache: Mapping[str, Array], key: Array, value: Array) -> Contents:
    """New keys and values as they are stored."""
    dtype = cache[KEY].dtype
    if KEY_SCALE not in cache:
        return {KEY: key.astype(dtype), VALUE: value.astype(dtype)}
    contents: Contents = {}
    contents[KEY], contents[KEY_SCALE] = quantization.quantize(key, dtype)
    contents[VALUE], contents[VALUE_SCALE] = quantization.quantize(value, dtype)
    return contents


def _write_row(old: Array, new: Array, start: Array, fits: Array) -> Array:
    """Of tokens that begin before the array or overhang its end, the slice is moved to where `dynamic_update_slice`
    leaves it. So tokens are rolled by as much, and where there are none, what was there is written back.
    """
    length = min(new.shape[0], old.shape[0])
    if new.shape[0] > length:  # then no more of them can be in the array
        first = jnp.clip(-start, 0, new.shape[0] - length)
        new, start = lax.dynamic_slice_in_dim(new, first, length), start + first
    at = jnp.clip(start, 0, old.shape[0] - length)
    before = lax.dynamic_slice_in_dim(old, at, length)
    token = positions(length) + (at - start)
    is_new = ((token >= 0) & (token < length) & fits).reshape(-1, *[1] * (old.ndim - 1))
    new = new if length == 1 else jnp.roll(new, start - at, axis=0)
    return lax.dynamic_update_slice_in_dim(old, jnp.where(is_new, new, before), at, axis=0)


_write_rows = jax.vmap(_write_row)


@jax.vmap  # mesh axes may cut the rows
def _write_ring(old: Array, new: Array, at: Array, is_token: Array) -> Array:
    new = jnp.where(is_token.reshape(-1, *[1] * (new.ndim - 1)), new, old[at])  # padding leaves what is there
    return old.at[at].set(new, unique_indices=True)


def _gather(x: Array, index: Int[Array, "B X"]) -> Array:
    """Of each row the entries at these places, or any others where there are none."""
    return jax.vmap(lambda x, index: jnp.take(x, index, axis=0, mode="clip"))(x, index)


def _padded(x: Array, more: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))


# -- what can be wrong ------------------------------------------------------------------------------------------------


def _check_shape(cache: Mapping[str, Array], key: Array) -> None:
    batch, _, *heads = cache[KEY].shape
    if key.ndim != 4 or key.shape[0] != batch or list(key.shape[2:]) != heads:
        raise ValueError(
            f"New keys must fit the cache [batch, max_length, kv_heads, head_dim]={cache[KEY].shape}: "
            f"key.shape={key.shape}."
        )


def _window_left(cache: Mapping[str, Array], window: tuple[int | None, int | None] | None) -> int:
    slots, left = cache[KEY].shape[1], None if window is None else window[0]
    if left is None or layout.ring_slots(left) > slots:
        raise ValueError(
            "A ring buffer holds one window; this module's is not in it: "
            f"local_window_size={window}, slots={slots}. Make the cache with this module's init_cache."
        )
    return left
