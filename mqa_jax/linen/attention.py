"""Multi-query, grouped-query, multi-head and single-head attention as `flax.linen` modules."""

import flax.linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array

from mqa_jax.cache import layout
from mqa_jax.layer import settings
from mqa_jax.layer.attention_layer import AttentionLayer, Cache
from mqa_jax.layer.calls import Call
from mqa_jax.linen.bridge import check_bridge
from mqa_jax.linen.init_cache import wanted
from mqa_jax.linen.norms import make_norm
from mqa_jax.linen.random import dropout_key


class GroupedQueryAttention(AttentionLayer, nn.Module):
    __doc__ = f"""Grouped-query attention with rotary or ALiBi positions, a KV cache, and upstream's options.

    Parameters have the names and shapes of `flax.linen.MultiHeadDotProductAttention`.

    {settings.AttentionSettings.__doc__}"""

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()

    __call__ = nn.compact(AttentionLayer.__call__)

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike | None = None) -> dict[str, Array]:
        """An empty cache of this module: `{"cached_key", "cached_value", "cache_index", ...}`, see `mqa_jax.cache`.

        Bound to variables with a mutable `cache` collection, it also puts it there. For a whole model see
        `mqa_jax.init_cache`. `dtype` defaults to `cache_dtype`, or else the module's; another float dtype than the
        queries' costs a conversion of the whole cache every step, 8 bits do not. A ring buffer needs no `max_length`:
        its bytes depend on the window alone.
        """
        cache = self.new_cache(batch, max_length, dtype)
        if self.scope is not None and self.is_mutable_collection("cache"):
            self._store(cache)
        return cache

    def _layer(self, name: str) -> nn.Module:
        if name in ("q_ln", "k_ln"):
            return make_norm(
                self.norm_type, epsilon=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )
        return nn.DenseGeneral(
            **self._dense_settings(name),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,  # type: ignore[arg-type]
            name=name,
        )

    def _weight(self, name: str) -> Array | None:
        initializer, shape = self._weight_settings(name)
        return None if shape is None else self.param(name, initializer, shape, self.param_dtype)

    def _dropout_key(self, deterministic: bool | None) -> Array | None:
        return dropout_key(self, deterministic)

    def _makes_parameters(self) -> bool:
        return self.is_initializing()

    def _cache(self, call: Call) -> Cache | None:
        """Also makes it where `mqa_jax.init_cache` traces the model, and one more for each further call in a step."""
        sizes = wanted()
        if sizes is not None and call.is_self_attention:
            earlier = self._stored()
            self._store(self.new_cache(*sizes))
            if earlier:
                self.put_variable("cache", layout.OTHER_CALLS, (*earlier.pop(layout.OTHER_CALLS, ()), earlier))
        cache = self._stored()
        if cache:
            check_bridge(cache[layout.KEY])
        self._check_collection(call, is_cached=bool(cache))
        return cache or None

    def _stored(self) -> Cache:
        names = *layout.NAMES, layout.OTHER_CALLS
        return {name: self.get_variable("cache", name) for name in names if self.has_variable("cache", name)}

    def _store(self, cache: Cache) -> None:
        for name, array in cache.items():
            self.put_variable("cache", name, array)

    def _check_collection(self, call: Call, is_cached: bool) -> None:
        """A cache that is never found, or never written, is not the cache that somebody passed."""
        if is_cached and not self.is_mutable_collection("cache"):
            raise ValueError("The new tokens cannot be written: pass mutable=['cache'] to apply, and keep its result.")
        if is_cached or not call.causal or not call.is_self_attention or self.is_initializing():
            return
        collection = self.scope.root.variables().get("cache", {})  # type: ignore[union-attr]
        if collection:
            raise ValueError(
                f"The cache collection holds no cache for this module: path={self.path}, the collection has "
                f"{sorted(collection)}. Make it with mqa_jax.init_cache(model, ...), and pass it as variables['cache']."
            )


class MultiQueryAttention(settings.MultiQuery, GroupedQueryAttention):
    """`GroupedQueryAttention` with one key/value head (Shazeer 2019, arXiv 1911.02150). See there for all settings."""


class MultiHeadAttention(settings.MultiHead, GroupedQueryAttention):
    """`GroupedQueryAttention` with a key/value head for each query head (Vaswani et al. 2017, arXiv 1706.03762)."""


class Attention(settings.OneHead, GroupedQueryAttention):
    """`GroupedQueryAttention` with one head, not causal, without output projection: softmax(q k / sqrt(H)) v.

    The output has head_dim features (knotgrass/attention, class `Attention`).
    """
