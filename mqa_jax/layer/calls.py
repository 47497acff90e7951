"""What a call of an attention module may look like, and how upstream's masks and biases become the function's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Shaped

from mqa_jax.cache.append import Keys, Lengths
from mqa_jax.cache.checks import SHORT_COLUMNS, SHORT_ROWS, within
from mqa_jax.setting_types import is_flag


class Call(NamedTuple):
    """The arguments that depend on each other, and what they have to fit: D, K and H of the module."""

    x: Array
    past_key_value: Any
    inputs_k: ArrayLike | None
    inputs_v: ArrayLike | None
    prev_layer_key_value: Any
    segment_ids: ArrayLike | None
    seq_lengths: ArrayLike | None
    causal: bool
    sizes: tuple[int, int, int]

    def check(self, cached: Array | None) -> None:
        """`cached`: the keys of the cache, if there is one."""
        self._check_x(cached)
        for name in ("past_key_value", "prev_layer_key_value"):
            self._check_key_value(name, getattr(self, name))
        given = self._check_sources(cached is not None)
        self._check_inputs()
        if self.segment_ids is not None:
            if given:
                raise ValueError(
                    "segment_ids separate packed sequences in self-attention over x alone; "
                    f"with {' and '.join(given)} pass a mask."
                )
            integers("segment_ids", self.segment_ids, self.x.shape[:-1], "one id for each token")
        unclear = {"inputs_k": self.inputs_k, "past_key_value": self.past_key_value}
        names = [name for name, x in unclear.items() if x is not None]
        if self.seq_lengths is not None and names:
            raise ValueError(
                f"seq_lengths say which tokens of x are padding, and {names[0]} has keys of which they say nothing, in "
                "this call or a later one: pass a mask [..., S] of the keys, or use a cache."
            )

    def _check_x(self, cached: Array | None) -> None:
        x, (dim, *_) = self.x, self.sizes
        if x.ndim < 2 or x.shape[-1] != dim:
            raise ValueError(f"x must be [..., T, D]: x.shape={x.shape}, dim={dim}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating: x.dtype={x.dtype!s}. Embed tokens first, or cast with .astype().")
        if cached is not None and x.ndim != 3:
            raise ValueError(f"With a cache x must be [batch, T, D]: x.shape={x.shape}.")
        if cached is not None and cached.shape[:1] != x.shape[:1]:
            raise ValueError(
                "The cache was made for another batch: "
                f"x.shape={x.shape}, cache [batch, max_length, kv_heads, head_dim]={cached.shape}."
            )

    def _check_sources(self, cached: bool) -> list[str]:
        """Where earlier keys and values are, of which there is one place."""
        sources = {
            "a cache": cached,
            "past_key_value": self.past_key_value is not None and len(self.past_key_value) > 0,
            "inputs_k": self.inputs_k is not None,
            "prev_layer_key_value": self.prev_layer_key_value is not None,
        }
        given = [name for name, is_given in sources.items() if is_given]
        if len(given) > 1:
            raise ValueError(f"Only one of these can say where earlier keys and values are, got {' and '.join(given)}.")
        return given

    def _check_inputs(self) -> None:
        keys = self.x.shape if self.inputs_k is None else jnp.shape(self.inputs_k)
        for name, source in (("inputs_k", self.inputs_k), ("inputs_v", self.inputs_v)):
            if source is None:
                continue
            shape, dtype = jnp.shape(source), jnp.asarray(source).dtype
            if shape[:-2] != self.x.shape[:-2] or shape[:-1] != keys[:-1] or not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(
                    f"{name} must be floating [..., S, features] with the leading axes of x, S the same for keys and "
                    f"values: {name}.shape={shape}, {name}.dtype={dtype!s}, x.shape={self.x.shape}, "
                    f"keys from {keys}."
                )
        if self.inputs_v is not None and self.prev_layer_key_value is not None:
            raise ValueError("prev_layer_key_value are keys and values already, so there is no place for inputs_v.")
        if self.inputs_k is not None and self.causal and keys[-2] != self.x.shape[-2]:
            raise ValueError(
                "Causal attention to inputs_k of another length has no agreed meaning: "
                f"x.shape={self.x.shape}, inputs_k.shape={keys}. Pass causal=False."
            )

    def _check_key_value(self, name: str, pair: Any) -> None:
        """`()` or None, or a pair [..., S, K, H]."""
        if pair is None or (isinstance(pair, tuple | list) and len(pair) == 0 and name == "past_key_value"):
            return
        _, heads, features = self.sizes
        arrays = [jnp.asarray(array) for array in pair] if isinstance(pair, tuple | list) else []
        shapes = [array.shape for array in arrays] or jnp.shape(pair)
        right = len(arrays) == 2 and all(
            array.ndim == self.x.ndim + 1
            and array.shape == shapes[0]
            and array.shape[:-3] == self.x.shape[:-2]
            and (array.shape[-2] == heads or name != "past_key_value")
            and array.shape[-1] == features
            and jnp.issubdtype(array.dtype, jnp.floating)
            for array in arrays
        )
        if not right:
            raise ValueError(
                f"{name} must be (key, value), each [..., length, kv_heads, head_dim] with the leading axes of x, "
                f"floating: shapes={shapes}, dtypes={[str(array.dtype) for array in arrays]}, x.shape={self.x.shape}, "
                f"kv_heads={heads}, head_dim={features}. mqa_jax.torch_interop converts upstream's layouts."
            )
        if name == "prev_layer_key_value" and arrays[0].shape[-3] < self.x.shape[-2]:
            raise ValueError(
                "The queries are the last T positions of prev_layer_key_value, which has fewer: "
                f"x.shape={self.x.shape}, shapes={shapes}."
            )

    @property
    def is_self_attention(self) -> bool:
        """Whether a cache is what could hold earlier keys."""
        return self.past_key_value is None and self.inputs_k is None and self.prev_layer_key_value is None

    @property
    def query_offset(self) -> int:
        """Position of the first query, without a cache: behind what is past; at the end of another layer's keys."""
        if self.past_key_value:
            return self.past_key_value[0].shape[-3]
        if self.prev_layer_key_value is not None:
            return self.prev_layer_key_value[0].shape[-3] - self.x.shape[-2]
        return 0


def check_flags(**flags: Any) -> None:
    """Arguments that are None or a bool; anything else would count as True."""
    for name, x in flags.items():
        if x is not None and not is_flag(x):
            raise ValueError(f"{name} must be True or False: {name}={x!r}.")


def integers(name: str, x: ArrayLike, shape: tuple[int, ...], what: str, remedy: str = "") -> ArrayLike:
    x = jnp.asarray(x) if isinstance(x, list | tuple) else x
    found, dtype = jnp.shape(x), jnp.result_type(x)
    if found != shape or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers, {what}: {name}.shape={found}, expected {shape}, {name}.dtype={dtype!s}.{remedy}"
        )
    return x  # not yet an array of JAX, which would cut it down to 32 bits


def checked_lengths(seq_lengths: ArrayLike | None, x: Array, tokens: int) -> Lengths | None:
    """For each row a number of tokens that is there; see `cache.checks.within` for what cannot be known yet."""
    if seq_lengths is None:
        return None
    remedy = " A mask of the tokens goes to attention_mask=; how many it has in each row is mask.sum(-1)."
    rule = "how many of the T tokens of each row count"
    lengths = integers("seq_lengths", seq_lengths, x.shape[:-2], rule, remedy)
    message = "seq_lengths must lie between 0 and the tokens of the call: seq_lengths={value}, tokens={high}."
    return Lengths(*within(lengths, 0, tokens, message))


def checked_positions(positions: ArrayLike, x: Array) -> Int[Array, "..."]:
    """`[T]`, or with leading axes that are those of x or 1."""
    shape = jnp.shape(positions)
    axes = zip(shape[:-1][::-1], x.shape[:-2][::-1])
    broadcasts = shape[-1:] == x.shape[-2:-1] and len(shape) < x.ndim and all(n in (1, whole) for n, whole in axes)
    what = "one for each token, [..., T]"
    return jnp.asarray(integers("positions", positions, shape if broadcasts else x.shape[:-1], what))


def pair_mask(name: str, mask: ArrayLike | None, batch: tuple[int, ...]) -> Array | None:
    """`[..., S]` (keys), `[..., T, S]` or `[..., N, T, S]`, bool, as `[..., N, T, S]`."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != jnp.bool_:
        floating = jnp.issubdtype(mask.dtype, jnp.floating)
        raise ValueError(
            f"{name} must be bool, True = may attend: {name}.dtype={mask.dtype!s}. "
            + ("One that is added to the scores goes to bias=, " if floating else "")
            + f"{'one' if floating else 'One'} of 0 and 1, such as a tokenizer's, is {name}.astype(bool)."
        )
    extra = mask.ndim - len(batch)
    if extra not in (1, 2, 3) or any(n not in (1, whole) for n, whole in zip(mask.shape, batch)):
        raise ValueError(
            f"{name} must be [..., S], [..., T, S] or [..., N, T, S], where ... are the leading axes of x or 1: "
            f"{name}.shape={mask.shape}, leading axes of x={batch}."
        )
    return mask.reshape(mask.shape[: len(batch)] + (1,) * (3 - extra) + mask.shape[len(batch) :])


def pair_bias(bias: ArrayLike | None, batch: tuple[int, ...]) -> Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    axes = zip(bias.shape[:-3][::-1], batch[::-1])
    if not 2 <= bias.ndim <= len(batch) + 3 or any(n not in (1, whole) for n, whole in axes):
        raise ValueError(f"bias must be [..., N, T, S]: bias.shape={bias.shape}. Give axes that are shared size 1.")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ValueError(f"bias must be floating: bias.dtype={bias.dtype!s}. A boolean mask goes to mask=.")
    return bias


def limits(rows: int, in_ring: bool, *pairs: Array | None) -> list[tuple[int, str]]:
    """How many positions masks and biases reach that are read by position, for `cache.append.append`."""
    given = [x.shape for x in pairs if x is not None]
    tables = [(shape[-2], SHORT_ROWS) for shape in given if shape[-2] > rows]
    return tables + [(shape[-1], SHORT_COLUMNS) for shape in given if shape[-1] > 1 and in_ring]


def last_rows_and_columns(bias: Array | None, keys: Keys, rows: int) -> Array | None:
    """Of a bias that was made for a longer text, the part for the last queries and keys: upstream's way."""
    if bias is None:
        return None
    return bias[..., max(0, bias.shape[-2] - rows) :, max(0, bias.shape[-1] - keys.key.shape[-3]) :]


def by_position(name: str, pairs: Array | None, keys: Keys, rows: int) -> Array | None:
    """A mask or bias for cached keys as they lie: its rows are those of the call, or of all positions."""
    if pairs is None or keys.start is None:
        return pairs
    pairs = pairs.reshape((1,) * (4 - pairs.ndim) + pairs.shape)
    if pairs.shape[-2] > rows:
        place = keys.start[:, None] + np.arange(rows, dtype=np.int32)[None]
        pairs = _at(pairs, place, axis=-2)  # beyond its end the row is worthless
    columns = pairs.shape[-1]
    if columns == 1:
        return pairs
    if keys.positions is not None:
        return _at(pairs, keys.positions, axis=-1)  # slots without a position are hidden, or the row is worthless
    if columns < keys.columns:
        raise ValueError(
            f"With a static cache {name} has a column for each of its positions: {name}.shape={pairs.shape}, "
            f"max_length={keys.columns}. Pad it; what lies behind the last token is never seen."
        )
    return pairs[..., : keys.columns]


def _at(pairs: Shaped[Array, "#B N T S"], index: Int[Array, "B X"], axis: int) -> Shaped[Array, "B N _ _"]:
    """Of an axis, the nearest entries to the places of each batch row, which mesh axes cut as the places."""
    index = jnp.clip(index, 0, pairs.shape[axis] - 1)
    sharding, rows = jax.typeof(pairs).sharding, jax.typeof(index).sharding.spec[0]
    if pairs.shape[0] > 1:
        if sharding.spec[0] != rows:
            pairs = jax.sharding.reshard(pairs, P(rows, *sharding.spec[1:]))
        return jax.vmap(lambda pairs, index: jnp.take(pairs, index, axis, mode="clip"))(pairs, index)
    (_, *of_table), before = sharding.spec, (slice(None),) * (3 + axis)
    spec = P(*of_table[: 3 + axis], rows, None, *of_table[4 + axis :])
    taken = pairs[0].at[*before, index].get(mode="clip", out_sharding=spec if rows else None)
    return jnp.moveaxis(taken, axis - 1, 0)


def check_weights(keys: Keys) -> None:
    if keys.positions is not None:
        raise NotImplementedError(
            "needs_weights wants keys in the order of their positions, which a ring buffer has not: "
            "cache_layout='ring'. Use cache_layout='static'."
        )
