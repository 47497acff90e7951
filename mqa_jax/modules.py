"""Multi-query, grouped-query, multi-head and single-head attention as `flax.linen` modules.

They are one module, `GroupedQueryAttention`; the others fix some of its settings. It owns projections, norms and the
cache; attention itself is `mqa_jax.dot_product_attention`. Its parameters have the names and shapes of
`flax.linen.MultiHeadDotProductAttention`: `query`, `key`, `value` with kernel `[D, N | K, H]`, `out` with `[N, H, D]`.
"""

import sys
import warnings
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from mqa_jax import cache_append, kv_cache, module_calls, shapes
from mqa_jax.attention import attention_with_weights, dot_product_attention
from mqa_jax.cache_append import Keys, Lengths
from mqa_jax.checks import checked_window
from mqa_jax.module_settings import check_kv_heads, check_settings, implementation_of
from mqa_jax.norms import make_norm
from mqa_jax.options import Options
from mqa_jax.positions import Rope, TemperatureTuning, alibi_slopes, falcon_alibi

KeyValue = tuple[Float[Array, "... S K H"], Float[Array, "... S K H"]]


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention with rotary or ALiBi positions, a KV cache, and upstream's options.

    Settings and defaults are those of mqa's and zeta's `MultiQueryAttention` (from dim to device), then llm-foundry's
    and Flax's. Axis letters are those of `mqa_jax.shapes`: D = dim, N = heads, K = kv_heads, H = head_dim.

    Attributes:
      dim: features of the model, D; required. `d_model` is another name for it.
      heads: query heads, N; required.
      attn_impl: upstream's "triton" and "flash" (the fastest for the platform) or "torch" (plain XLA), or an
        `implementation` of `dot_product_attention`, None included.
      clip_qkv: clamp queries, keys and values to [-clip_qkv, clip_qkv] after their projection. None or 0 is off.
      qk_ln: normalise queries and keys, over all heads together.
      softmax_scale: default 1 / sqrt(head_dim).
      attn_pdrop: dropout rate of the attention weights; its random key is the `dropout` collection.
      norm_type: "layernorm", "low_precision_layernorm", "rmsnorm" or "low_precision_rmsnorm".
      fc_type: "torch", upstream's name for a plain dense layer, is the only one.
      verbose: above 0, print to stderr what is computed, each time the module is traced.
      device: accepted, and explained in a warning: JAX places arrays, not modules.
      kv_heads: key/value heads, K; divides N. Default N, which is multi-head attention.
      head_dim: features of a head, H. Default D / N.
      qk_gn: normalise queries and keys head by head, with one norm of H features.
      norm_eps: epsilon of these norms.
      causal: whether calls are causal that do not say.
      rope: rotary positions, or None.
      alibi: add ALiBi with the slopes `alibi_slopes(heads, alibi_bias_max)`; "falcon": as Falcon rounds and scales it
        (`mqa_jax.positions.falcon_alibi`).
      attn_temperature_tuning: scales queries by their position, or None.
      local_window_size, logits_soft_cap: as in `dot_product_attention`.
      cache_layout: "static", or "ring": a cache as long as the window, through which any number of tokens goes.
      cache_dtype: of cached keys and values; "int8" and "float8_e4m3fn" have a scale for each token and head, and
        `mqa_jax.quantization` says how far results may be off. Default: the dtype in which the module computes.
      sinks: learn one sink for each head.
      add_bias_kv, add_zero_attn: as in `torch.nn.MultiheadAttention`: one more key and value, learned or zero.
      use_bias: biases of the projections. `use_out_bias` is that of the output, by default the same.
      output_projection: whether there is one. Without it the output has N * H features.
      out_features: default D.
      deterministic, dtype, param_dtype, precision, kernel_init, bias_init: as in `flax.linen`.
    """

    dim: int = 0
    heads: int = 0
    attn_impl: str | None = "triton"
    clip_qkv: float | None = None
    qk_ln: bool = False
    softmax_scale: float | None = None
    attn_pdrop: float = 0.0
    norm_type: str = "low_precision_layernorm"
    fc_type: str = "torch"
    verbose: int = 0
    device: Any = None
    d_model: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_gn: bool = False
    norm_eps: float = 1e-5
    causal: bool = True
    rope: Rope | None = None
    alibi: bool | str = False
    alibi_bias_max: float = 8
    attn_temperature_tuning: TemperatureTuning | None = None
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    cache_layout: str = "static"
    cache_dtype: DTypeLike | None = None
    sinks: bool = False
    add_bias_kv: bool = False
    add_zero_attn: bool = False
    use_bias: bool = True
    use_out_bias: bool | None = None
    output_projection: bool = True
    out_features: int | None = None
    deterministic: bool | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: jax.lax.PrecisionLike = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()

    def __post_init__(self) -> None:
        check_settings(self)
        super().__post_init__()

    # -- what users call --------------------------------------------------------------------------------------------

    @nn.compact
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
    ) -> tuple[Float[Array, "... T D"], Float[Array, "... N T S"] | None, KeyValue | None]:
        """Attends from `x` to itself, to what was cached before it, or to `inputs_k`.

        Where the variables hold a `cache` collection (see `init_cache`), the new keys and values are appended to it and
        the queries attend to all of it; call with `mutable=["cache"]`. The key axis S of `mask` and `bias` is then the
        position, of which there are `max_length`; with a ring buffer any length that reaches the last token will do.
        Their query axis is that of the call, or longer: then it is the position, too, so that one table of all pairs
        serves every call. A row whose tokens do not fit is an error, or, under jit, NaN and a check for `checkify`.

        Args:
          x: any leading axes; one batch axis with a cache.
          past_key_value: keys and values of earlier tokens, each `[..., length, K, H]`, or `()` to start; the third
            result is then theirs and the new ones together. The `cache` collection is the better way under jit.
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

        Returns:
          (output, weights or None, past_key_value or None).
        """
        x = jnp.asarray(x)
        causal = self.causal if causal is None else causal
        module_calls.check_flags(causal=causal, needs_weights=needs_weights, deterministic=deterministic)
        self._allocate(inputs_k is None and prev_layer_key_value is None and past_key_value is None)
        cached = self.has_variable("cache", kv_cache.KEY)
        sizes = self.dim, self._kv_heads, self._head_dim
        earlier = past_key_value, inputs_k, inputs_v, prev_layer_key_value
        call = module_calls.Call(x, *earlier, segment_ids, seq_lengths, causal, cached, sizes)
        call.check()
        self._check_collection(call)
        self._speak(x)
        query = self._project("query", x, self.heads)
        cache = self._cache() if cached else None
        offset = call.query_offset if cache is None else kv_cache.index_of(cache)
        bias = module_calls.pair_bias(bias, batch=x.shape[:-2])
        mask = module_calls.pair_mask(mask, attention_mask, batch=x.shape[:-2])
        positions = self._positions(x, offset) if positions is None else module_calls.checked_positions(positions, x)
        if prev_layer_key_value is None:
            key, value = self._project_keys(x, inputs_k, inputs_v, positions)
        else:
            key, value = promote_dtype(*prev_layer_key_value, dtype=query.dtype)
        query = query if self.rope is None else self.rope(query, positions)
        query = query if self.attn_temperature_tuning is None else self.attn_temperature_tuning(query, positions)
        lengths = module_calls.checked_lengths(seq_lengths, x)
        rows = x.shape[-2]
        if cache is None:
            keys = self._keys(key, value, offset, lengths, past_key_value)
            bias = module_calls.last_rows_and_columns(bias, keys, rows)
        else:
            limits = module_calls.limits(rows, kv_cache.RING_INDEX in cache, mask, bias)
            keys = self._append(cache, key, value, lengths, limits)
        out, weights = self._attend(
            query,
            keys,
            module_calls.by_position("bias", bias, keys, rows),
            module_calls.by_position("mask", mask, keys, rows),
            needs_weights,
            is_causal=causal,
            query_segment_ids=segment_ids,
            key_value_segment_ids=segment_ids,
            **self._dropout(deterministic),
        )
        present = None if past_key_value is None else (keys.key, keys.value)
        return self._project_out(out), weights, present

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike | None = None) -> dict[str, Array]:
        """An empty cache of this module: `{"cached_key", "cached_value", "cache_index", ...}`, see `mqa_jax.kv_cache`.

        Bound to variables with a mutable `cache` collection, it also puts it there. For a whole model see
        `mqa_jax.init_cache`. `dtype` defaults to `cache_dtype`, or else the module's; another float dtype than the
        queries' costs a conversion of the whole cache every step, 8 bits do not. A ring buffer needs no `max_length`:
        its bytes depend on the window alone.
        """
        dtype = dtype or self.cache_dtype or self.dtype or self.param_dtype
        length, index = max_length, kv_cache.INDEX
        if self.cache_layout == "ring":
            left, _ = self._window or (None, None)
            assert left is not None  # see check_settings
            length, index = kv_cache.ring_slots(left), kv_cache.RING_INDEX
        cache = kv_cache.new_cache(batch, length, self._kv_heads, self._head_dim, dtype, index)
        if self.scope is not None and self.is_mutable_collection("cache"):
            for name, array in cache.items():
                self.put_variable("cache", name, array)
        return cache

    # -- its parts ----------------------------------------------------------------------------------------------------

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _head_dim(self) -> int:
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    def _project(self, name: str, x: Array, heads: int) -> Float[Array, "... L heads H"]:
        """Projection, then clipping, then norm (upstream's order)."""
        x = self._dense(name, (heads, self._head_dim), -1, self.use_bias)(x)
        if self.clip_qkv:
            x = jnp.clip(x, -self.clip_qkv, self.clip_qkv)
        if name == "value" or not (self.qk_ln or self.qk_gn):
            return x
        norm = make_norm(
            self.norm_type,
            epsilon=self.norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name={"query": "q_ln", "key": "k_ln"}[name],
        )
        normed = norm(x if self.qk_gn else x.reshape(*x.shape[:-2], -1))
        return normed.reshape(x.shape).astype(x.dtype)

    def _project_keys(self, x: Array, inputs_k: Any, inputs_v: Any, positions: Array) -> KeyValue:
        if inputs_k is not None:
            inputs_k = jnp.asarray(inputs_k)
            positions = shapes.positions(inputs_k.shape[-2])
        source = x if inputs_k is None else inputs_k
        key = self._project("key", source, self._kv_heads)
        value = self._project("value", source if inputs_v is None else jnp.asarray(inputs_v), self._kv_heads)
        return key if self.rope is None else self.rope(key, positions), value

    def _project_out(self, out: Float[Array, "... T N H"]) -> Float[Array, "... T D"]:
        if not self.output_projection:
            return out.reshape(*out.shape[:-2], -1)
        use_bias = self.use_bias if self.use_out_bias is None else self.use_out_bias
        return self._dense("out", self.out_features or self.dim, (-2, -1), use_bias)(out)

    def _dense(
        self, name: str, features: int | tuple[int, ...], axis: int | tuple[int, ...], use_bias: bool
    ) -> nn.Module:
        return nn.DenseGeneral(
            features,
            axis=axis,
            use_bias=use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,  # type: ignore[arg-type]
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            name=name,
        )

    @staticmethod
    def _positions(x: Array, offset: int | Array) -> Int[Array, "... T"]:
        offset = jnp.asarray(offset, jnp.int32)[..., None]
        return offset + jnp.expand_dims(shapes.positions(x.shape[-2]), range(offset.ndim - 1))

    @staticmethod
    def _keys(key: Array, value: Array, offset: int | Array, lengths: Lengths | None, past: Any) -> Keys:
        """What is attended to without a cache: what is past and what is new."""
        if past:
            key, value = (jnp.concatenate(pair, axis=-3) for pair in zip(past, (key, value)))
        if lengths is None:
            return Keys(key, value, query_offset=offset)
        return Keys(key, value, lengths=offset + lengths.tokens, query_offset=offset, spoiled=lengths.wrong)

    @property
    def _window(self) -> tuple[int | None, int | None] | None:
        return checked_window(self.local_window_size)

    def _cache(self) -> dict[str, Array]:
        return {name: self.get_variable("cache", name) for name in kv_cache.NAMES if self.has_variable("cache", name)}

    def _allocate(self, is_self_attention: bool) -> None:
        """Makes a cache where `mqa_jax.init_cache` traces the model, and one more for each further call in a step."""
        wanted = kv_cache.wanted()
        if wanted is None or not is_self_attention:
            return
        earlier = self._cache()
        self.init_cache(*wanted)
        if earlier:
            others = self.get_variable("cache", kv_cache.OTHER_CALLS, ())
            self.put_variable("cache", kv_cache.OTHER_CALLS, (*others, earlier))

    def _check_collection(self, call: module_calls.Call) -> None:
        """A cache that is never found, or never written, is not the cache that somebody passed."""
        if call.cached and not self.is_mutable_collection("cache"):
            raise ValueError("The new tokens cannot be written: pass mutable=['cache'] to apply, and keep its result.")
        if call.cached or not call.causal or call.has_earlier or self.is_initializing():
            return
        collection = self.scope.root.variables().get("cache", {})  # type: ignore[union-attr]
        if collection:
            raise ValueError(
                f"The cache collection holds no cache for this module: path={self.path}, the collection has "
                f"{sorted(collection)}. Make it with mqa_jax.init_cache(model, ...), and pass it as variables['cache']."
            )

    def _append(
        self, cache: dict[str, Array], key: Array, value: Array, lengths: Lengths | None, limits: list[tuple[int, str]]
    ) -> Keys:
        """Stores the new tokens, and puts the cache behind those of the other calls of this module in a step."""
        cache, keys = cache_append.append(cache, key, value, lengths, window=self._window, limits=limits)
        others = self.get_variable("cache", kv_cache.OTHER_CALLS, ())
        if others:
            following, *rest = others
            self.put_variable("cache", kv_cache.OTHER_CALLS, (*rest, cache))
            cache = following
        for name, array in cache.items():
            self.put_variable("cache", name, array)
        return keys

    def _attend(
        self, query: Array, keys: Keys, bias: Array | None, mask: Array | None, needs_weights: bool, **options: Any
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
            added = falcon_alibi(self.heads, self._head_dim, keys.key.shape[-3])
            bias = added if bias is None else bias.astype(jnp.float32) + added
        arrays = query, keys.key, keys.value, bias, mask
        log_sum_exp: Array | None
        weights = None
        if needs_weights:
            module_calls.check_weights(keys)
            out, log_sum_exp, weights = attention_with_weights(*arrays, Options(**options))
        else:
            implementation = implementation_of(self.attn_impl)
            found = dot_product_attention(
                *arrays, **options, implementation=implementation, return_residual=self.add_bias_kv
            )
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
        if not self.sinks:
            return jnp.zeros(self.heads) if self.add_zero_attn else None
        sinks = self.param("sinks", nn.initializers.zeros_init(), (self.heads,), self.param_dtype)
        return jnp.logaddexp(sinks, 0.0) if self.add_zero_attn else sinks

    def _attend_to_bias_kv(
        self, query: Array, out: Array, log_sum_exp: Array, weights: Array | None
    ) -> tuple[Array, Array | None]:
        """Merges in the learned key and value that every query sees: two partial softmaxes, weighed by log-sum-exp."""
        shape = self._kv_heads, self._head_dim
        bias_k, bias_v = (self.param(name, self.kernel_init, shape, self.param_dtype) for name in ("bias_k", "bias_v"))
        grouped = query.reshape(*query.shape[:-2], self._kv_heads, -1, self._head_dim).astype(log_sum_exp.dtype)
        scale = self._head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale
        score = scale * jnp.einsum(
            "...kgh,kh->...kg", grouped, bias_k.astype(grouped.dtype), precision="highest"
        ).reshape(log_sum_exp.shape)
        share = jax.nn.sigmoid(log_sum_exp - score)  # of the keys before it, [..., T, N]
        added = jnp.repeat(bias_v, self.heads // self._kv_heads, axis=0)  # [N, H]
        added = jnp.expand_dims(added, range(out.ndim - 2)).astype(share.dtype)
        out = (share[..., None] * out + (1 - share)[..., None] * added).astype(out.dtype)
        return out, None if weights is None else weights * jnp.swapaxes(share, -1, -2)[..., None]

    def _dropout(self, deterministic: bool | None) -> dict[str, Any]:
        if not self.attn_pdrop:
            return {}
        if nn.merge_param("deterministic", self.deterministic, deterministic):
            return {}
        return dict(dropout_rate=self.attn_pdrop, dropout_rng=self.make_rng("dropout"))

    def _speak(self, x: Array) -> None:
        if self.device is not None:
            warnings.warn(
                f"device={self.device!r} has no effect: JAX computes where its arrays are. Place them with "
                "jax.device_put(x, device), or with shardings under jax.jit.",
                stacklevel=3,
            )
        if self.verbose > 0:
            print(
                f"{type(self).__name__} {self.name or ''}: {x.shape=}, dtype={x.dtype}, heads={self.heads}, "
                f"kv_heads={self._kv_heads}, head_dim={self._head_dim}, attn_impl={self.attn_impl!r}",
                file=sys.stderr,
            )


class MultiQueryAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` with one key/value head (Shazeer 2019, arXiv 1911.02150). See there for all settings."""

    kv_heads: int | None = 1

    def __post_init__(self) -> None:
        check_kv_heads(self, allowed=1)
        super().__post_init__()


class MultiHeadAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` with a key/value head for each query head (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __post_init__(self) -> None:
        check_kv_heads(self, allowed=self.heads)
        super().__post_init__()


class Attention(GroupedQueryAttention):
    """`GroupedQueryAttention` with one head, not causal, without output projection: softmax(q k / sqrt(H)) v.

    The output has head_dim features (knotgrass/attention, class `Attention`).
    """

    heads: int = 1
    kv_heads: int | None = 1
    causal: bool = False
    output_projection: bool = False

    def __post_init__(self) -> None:
        check_kv_heads(self, allowed=1)
        super().__post_init__()
