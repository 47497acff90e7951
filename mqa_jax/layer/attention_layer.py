"""What a call of an attention module computes: projections, norms, positions, the cache, attention, output.

Attention itself is `mqa_jax.dot_product_attention`. Parameters have the names and shapes of Flax's own modules:
`query`, `key`, `value` with kernel `[D, N | K, H]`, `out` with `[N, H, D]`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, zeros
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from mqa_jax.attention import attention_with_weights
from mqa_jax.cache import append, layout
from mqa_jax.cache.append import Keys, Lengths
from mqa_jax.layer import calls, cut_sequence, projection, upstream
from mqa_jax.layer.cut_sequence import Sequence
from mqa_jax.layer.settings import AttentionSettings
from mqa_jax.positions import alibi_slopes, falcon_alibi

KeyValue = tuple[Float[Array, "... S K H"], Float[Array, "... S K H"]]
Cache = dict[str, Any]  # by the names of `mqa_jax.cache.layout`


class AttentionLayer(AttentionSettings, ABC):
    """The computation; a class for each API of Flax answers where parameters, cache and random keys are."""

    # -- what the API answers -----------------------------------------------------------------------------------------

    @abstractmethod
    def _layer(self, name: str) -> Callable[[Array], Array]:
        """The projection "query", "key", "value" or "out", or the norm "q_ln" or "k_ln"."""

    @abstractmethod
    def _weight(self, name: str) -> Array | None:
        """The parameter "sinks", "bias_k" or "bias_v"; None where the settings have none."""

    @abstractmethod
    def _cache(self, call: calls.Call) -> Cache | None:
        """What is cached for this call, if anything is."""

    @abstractmethod
    def _store(self, cache: Cache) -> None:
        """Puts this in place of what `_cache` returned, under the same names."""

    @abstractmethod
    def _dropout_key(self, deterministic: bool | None) -> Array | None:
        """A new random key, or None where this call has no dropout; asked only where there is a rate."""

    @abstractmethod
    def _makes_parameters(self) -> bool:
        """Whether this call is there to make the parameters."""

    # -- what users call ----------------------------------------------------------------------------------------------

    def __call__(
        self,
        x: Float[ArrayLike, "... T D"],
        past_key_value: KeyValue | tuple[()] | None = None,
        bias: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        causal: bool | None = None,
        needs_weights: bool = False,
        *,
        attention_mask: ArrayLike | None = None,
        deterministic: bool | None = None,
        inputs_k: Float[ArrayLike, "... S _"] | None = None,
        inputs_v: Float[ArrayLike, "... S _"] | None = None,
        prev_layer_key_value: KeyValue | None = None,
        positions: Int[ArrayLike, "... T"] | None = None,
        segment_ids: Int[ArrayLike, "... T"] | None = None,
        seq_lengths: Int[ArrayLike, "..."] | None = None,
        score_fn: Callable | tuple | None = None,
        mask_fn: Callable | tuple | None = None,
    ) -> tuple[Float[Array, "... T D"], Float[Array, "... N T S"] | None, KeyValue | None]:
        """Attends from `x` to itself, to what was cached before it, or to `inputs_k`.

        Where there is a cache (see `init_cache`), the new keys and values are appended to it and the queries attend to
        all of it; modules of linen are called with `mutable=["cache"]` then. The key axis S of `mask` and `bias` is the
        position, of which there are `max_length`; with a ring buffer any length that reaches the last token will do.
        Their query axis is that of the call, or longer: then it is the position, too, so that one table of all pairs
        serves every call. A row whose tokens do not fit is an error, or, under jit, NaN and a check for `checkify`.

        Args:
          x: any leading axes; one batch axis with a cache.
          past_key_value: keys and values of earlier tokens, each `[..., length, K, H]`, or `()` to start; the third
            result is then theirs and the new ones together. A cache is the better way under jit.
          bias: added to the scores, broadcasts to `[..., N, T, S]`; of a longer one, without a cache, the last T rows
            and S columns.
          mask: bool, True = may attend: for keys `[..., S]`, for pairs `[..., T, S]`, or with heads `[..., N, T, S]`.
          causal: key position <= query position, positions counting from the first cached token.
          needs_weights: also return the weights. They are computed by the reference, in memory N * T * S.
          attention_mask: another name for `mask`.
          deterministic: no dropout.
          inputs_k: cross-attention: what keys and values are computed from, instead of `x`. `inputs_v`: values only.
          prev_layer_key_value: keys and values of an earlier layer, `[..., S, K, H]`, used as they are; no `key` and
            `value` parameters. The queries are the last T positions.
          positions: for RoPE and temperature, default offset + 0, 1, 2, ...
          segment_ids: packed sequences: only equal ids attend to each other.
          seq_lengths: how many of the T tokens of each row count; the rest is padding. A number that is not between 0
            and T is an error, or, under jit, NaN in that row and a check for `checkify`.
          score_fn, mask_fn: functions of positions, as in `dot_product_attention`; positions go on in a cache.

        Returns:
          (output, weights or None, past_key_value or None).
        """
        x = jnp.asarray(x)
        causal = self.causal if causal is None else causal
        calls.check_flags(causal=causal, needs_weights=needs_weights, deterministic=deterministic)
        earlier = past_key_value, inputs_k, inputs_v, prev_layer_key_value
        call = calls.Call(x, *earlier, segment_ids, seq_lengths, causal, (self.dim, self._kv_heads, self._head_dim))
        cache = self._cache(call)
        call.check(None if cache is None else cache[layout.KEY])
        upstream.announce(self, x, self._kv_heads, self._head_dim)
        query = self._project("query", x)
        sequence = cut_sequence.of_call(
            self.sequence_axis, call, query, cache, needs_weights, makes_parameters=self._makes_parameters()
        )
        offset = call.query_offset if cache is None else layout.index_of(cache)
        bias = calls.pair_bias(bias, batch=x.shape[:-2])
        mask = calls.pair_mask(*upstream.one_mask(mask, attention_mask), batch=x.shape[:-2])
        rows = x.shape[-2]
        if positions is None:
            positions = self._positions(sequence.positions(rows), offset)
        else:
            positions = calls.checked_positions(positions, x)
        if prev_layer_key_value is None:
            key, value = self._project_keys(sequence, x, inputs_k, inputs_v, positions)
        else:
            key, value = (jnp.asarray(array, query.dtype) for array in prev_layer_key_value)
        query = query if self.rope is None else self.rope(query, positions)
        query = query if self.attn_temperature_tuning is None else self.attn_temperature_tuning(query, positions)
        lengths = calls.checked_lengths(seq_lengths, x, sequence.whole(rows))
        if cache is None:
            keys = self._keys(key, value, offset, lengths, past_key_value)._replace(parts=sequence.parts)
            if self.sequence_axis is None:
                bias = calls.last_rows_and_columns(bias, keys, rows)
        else:
            limits = calls.limits(rows, layout.RING_INDEX in cache, mask, bias)
            cache, keys = append.append(
                cache, key, value, lengths, window=self._window, limits=limits, slots=sequence.slots
            )
            self._store(cache)
        bias, mask = calls.by_position("bias", bias, keys, rows), calls.by_position("mask", mask, keys, rows)
        if self.add_bias_kv and score_fn is not None:
            raise NotImplementedError("add_bias_kv works without score_fn only: its key has no position.")
        options: dict[str, Any] = dict(is_causal=causal)
        options |= dict(query_segment_ids=segment_ids, key_value_segment_ids=segment_ids)
        options |= dict(score_fn=score_fn, mask_fn=mask_fn)
        options |= self._dropout(deterministic)
        out, weights = self._attend(sequence, query, keys, bias, mask, needs_weights, **options)
        present = None if past_key_value is None else (keys.key, keys.value)
        return self._project_out(out), weights, present

    def new_cache(self, batch: int, max_length: int, dtype: DTypeLike | None = None) -> dict[str, Array]:
        """The arrays of an empty cache, which `init_cache` of each API describes."""
        dtype = dtype or self.cache_dtype or self.dtype or self.param_dtype
        cut_sequence.check_cache(self.sequence_axis, in_ring=self.cache_layout == "ring")
        length, index = max_length, layout.INDEX
        if self.cache_layout == "ring":
            left, _ = self._window or (None, None)
            assert left is not None  # see check_settings
            length, index = layout.ring_slots(left), layout.RING_INDEX
        return layout.new_cache(batch, length, self._kv_heads, self._head_dim, dtype, index)

    # -- its parts ----------------------------------------------------------------------------------------------------

    def _dense_settings(self, name: str) -> dict[str, Any]:
        """Shape, bias and initializers of a projection, and how it is computed."""
        settings: dict[str, Any] = dict(kernel_init=self.kernel_init, bias_init=self.bias_init)
        settings |= dict(dot_general=projection.dot_general, promote_dtype=projection.promote)
        if name == "out":
            use_bias = self.use_bias if self.use_out_bias is None else self.use_out_bias
            own = dict(kernel_init=self.out_kernel_init, bias_init=self.out_bias_init)
            settings |= {name: initializer for name, initializer in own.items() if initializer is not None}
            return dict(features=self.out_features or self.dim, axis=(-2, -1), use_bias=use_bias, **settings)
        heads = self.heads if name == "query" else self._kv_heads
        return dict(features=(heads, self._head_dim), axis=-1, use_bias=self.use_bias, **settings)

    def _weight_settings(self, name: str) -> tuple[Initializer, tuple[int, ...] | None]:
        """How a parameter beside the projections starts, and its shape; None where there is no such parameter."""
        if name == "sinks":
            return zeros, (self.heads,) if self.sinks else None
        return self.kernel_init, (self._kv_heads, self._head_dim) if self.add_bias_kv else None

    def _project(self, name: str, x: Array) -> Float[Array, "... L heads H"]:
        """Projection, then clipping, then norm (upstream's order)."""
        x = self._layer(name)(x)
        if self.clip_qkv:
            x = jnp.clip(x, -self.clip_qkv, self.clip_qkv)
        if name == "value" or not (self.qk_ln or self.qk_gn):
            return x
        norm = self._layer({"query": "q_ln", "key": "k_ln"}[name])
        normed = norm(x if self.qk_gn else x.reshape(*x.shape[:-2], -1))
        return normed.reshape(x.shape).astype(x.dtype)

    def _project_keys(self, sequence: Sequence, x: Array, inputs_k: Any, inputs_v: Any, positions: Array) -> KeyValue:
        if inputs_k is not None:
            inputs_k = jnp.asarray(inputs_k)
            positions = sequence.positions(inputs_k.shape[-2])
        source = x if inputs_k is None else inputs_k
        key = self._project("key", source)
        value = self._project("value", source if inputs_v is None else jnp.asarray(inputs_v))
        return key if self.rope is None else self.rope(key, positions), value

    def _project_out(self, out: Float[Array, "... T N H"]) -> Float[Array, "... T D"]:
        return self._layer("out")(out) if self.output_projection else out.reshape(*out.shape[:-2], -1)

    @staticmethod
    def _positions(positions: Int[Array, " T"], offset: int | Array) -> Int[Array, "... T"]:
        offset = jnp.asarray(offset, jnp.int32)[..., None]
        return offset + jnp.expand_dims(positions, range(offset.ndim - 1))

    @staticmethod
    def _keys(key: Array, value: Array, offset: int | Array, lengths: Lengths | None, past: Any) -> Keys:
        """What is attended to without a cache: what is past and what is new."""
        if past:
            key, value = (jnp.concatenate(pair, axis=-3) for pair in zip(past, (key, value)))
        if lengths is None:
            return Keys(key, value, query_offset=offset)
        return Keys(key, value, lengths=offset + lengths.tokens, query_offset=offset, spoiled=lengths.wrong)

    def _attend(
        self,
        sequence: Sequence,
        query: Array,
        keys: Keys,
        bias: Array | None,
        mask: Array | None,
        needs_weights: bool,
        **options: Any,
    ) -> tuple[Array, Array | None]:
        sinks = self._sinks()
        options |= keys.options()
        options |= dict(
            scale=self.softmax_scale,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            alibi_slopes=None if self.alibi in (False, "falcon") else alibi_slopes(self.heads, self.alibi_bias_max),
            sinks=sinks,
            precision=self.precision,
        )
        if self.alibi == "falcon":
            added = sequence.in_order(falcon_alibi(self.heads, self._head_dim, keys.columns))
            bias = added if bias is None else bias.astype(jnp.float32) + added
        arrays = query, keys.key, keys.value, bias, mask
        log_sum_exp: Array | None
        weights = None
        if needs_weights:
            calls.check_weights(keys)
            out, log_sum_exp, weights = attention_with_weights(*arrays, **options)
        else:
            implementation = upstream.implementation_of(self.attn_impl)
            found = sequence.attend(*arrays, **options, implementation=implementation, return_residual=self.add_bias_kv)
            out, log_sum_exp = found if self.add_bias_kv else (found, None)  # which cuDNN does not have
        if self.add_bias_kv:
            assert log_sum_exp is not None  # for mypy: it was asked for
            out, weights = self._attend_to_bias_kv(query, out, log_sum_exp, weights)
        if keys.spoiled is not None:
            spoiled = keys.spoiled[..., None, None, None]
            out = jnp.where(spoiled, jnp.nan, out)
            weights = None if weights is None else jnp.where(spoiled, jnp.nan, weights)
        return out, weights

    def _sinks(self) -> Float[Array, " N"] | None:
        """Learned sinks; an all-zero key and value is a sink of score 0."""
        sinks = self._weight("sinks")
        if sinks is None:
            return jnp.zeros(self.heads) if self.add_zero_attn else None
        return jnp.logaddexp(sinks, 0.0) if self.add_zero_attn else sinks

    def _attend_to_bias_kv(
        self, query: Array, out: Array, log_sum_exp: Array, weights: Array | None
    ) -> tuple[Array, Array | None]:
        """Merges in the learned key and value that every query sees: two partial softmaxes, weighed by log-sum-exp."""
        bias_k, bias_v = self._weight("bias_k"), self._weight("bias_v")
        assert bias_k is not None  # for mypy: the settings have both
        assert bias_v is not None
        group = self.heads // self._kv_heads

        def of_heads(x: Array) -> Array:
            """`[1, ..., N, H]`. Explicit mesh axes cut neither `jnp.repeat` nor queries in groups of K."""
            x = jnp.broadcast_to(x[:, None], (x.shape[0], group, x.shape[1])).reshape(self.heads, -1)
            return jnp.expand_dims(x, range(out.ndim - 2)).astype(log_sum_exp.dtype)

        scale = self._head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        score = scale * jnp.sum(query.astype(log_sum_exp.dtype) * of_heads(bias_k), axis=-1)
        share = jax.nn.sigmoid(log_sum_exp - score)  # of the keys before it, [..., T, N]
        out = (share[..., None] * out + (1 - share)[..., None] * of_heads(bias_v)).astype(out.dtype)
        return out, None if weights is None else weights * jnp.swapaxes(share, -1, -2)[..., None]

    def _dropout(self, deterministic: bool | None) -> dict[str, Any]:
        key = self._dropout_key(deterministic) if self.attn_pdrop else None
        return {} if key is None else dict(dropout_rate=self.attn_pdrop, dropout_rng=key)
