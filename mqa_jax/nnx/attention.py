"""Multi-query, grouped-query, multi-head and single-head attention as `flax.nnx` modules.

Inside a call only the contents of variables change, `variable[...] = x`, never an attribute: so the modules are right
in graph mode and in tree mode (FLIP 5310), where a transformation gives back nothing but variables' contents.
"""

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from mqa_jax.cache import layout
from mqa_jax.layer import settings
from mqa_jax.layer.attention_layer import AttentionLayer, Cache
from mqa_jax.layer.calls import Call
from mqa_jax.layer.tree_mode import is_tree_mode
from mqa_jax.nnx.norms import Norm
from mqa_jax.nnx.random import checked_rngs, dropout_key, new_stream, takes_rngs

WEIGHTS = "sinks", "bias_k", "bias_v"
LAYERS = "query", "key", "value", "out", "q_ln", "k_ln"
STATE = *LAYERS, *WEIGHTS, *layout.NAMES, layout.OTHER_CALLS, "rngs"
Metadata = Mapping[str, Mapping[str, Any]]


@dataclass(eq=False, repr=False, kw_only=True)
class GroupedQueryAttention(AttentionLayer, nnx.Module):
    __doc__ = f"""Grouped-query attention with rotary or ALiBi positions, a KV cache, and upstream's options.

    Parameters have the names and shapes of `flax.nnx.MultiHeadAttention`, and of this library's linen modules.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from mqa_jax import nnx as mqa_nnx
      >>> attention = mqa_nnx.GroupedQueryAttention(64, 8, kv_heads=2, rngs=nnx.Rngs(0))
      >>> out, _, _ = attention(jnp.ones((2, 5, 64)))
      >>> cached = nnx.view(attention, decode=True, batch_size=2, max_length=32)  # shares the weights
      >>> prompt, _, _ = cached(jnp.ones((2, 4, 64)))
      >>> token, _, _ = cached(jnp.ones((2, 1, 64)))
      >>> cached.cache_index[...].tolist()
      [5, 5]

    {settings.AttentionSettings.__doc__.rstrip() if settings.AttentionSettings.__doc__ else ""}
      rngs: `nnx.Rngs`; required. `keep_rngs`: store a stream of its keys for dropout; else calls have to pass one.
      in_kv_features, in_v_features: features of `inputs_k` and `inputs_v`, where they are not those of `x` and
        `inputs_k`. NNX makes parameters before it sees an input.
      key_value_projections: False for a layer that only reads `prev_layer_key_value`, without `key` and `value`.
      kernel_metadata, bias_metadata: metadata of each `nnx.Param` by the name of its layer (query, key, value, out,
        q_ln, k_ln) or its own (sinks, bias_k, bias_v), such as `dict(query=dict(out_sharding=(None, "model", None)))`.
      cache_sharding: names of the mesh axes of cached keys, `[batch, length, kv_heads, head_dim]`; the other arrays of
        a cache have the first of these axes.
    """

    in_kv_features: int | None = None
    in_v_features: int | None = None
    key_value_projections: bool = True
    cache_sharding: tuple[str | None, ...] | None = None
    keep_rngs: bool = True
    kernel_metadata: InitVar[Metadata | None] = None
    bias_metadata: InitVar[Metadata | None] = None
    rngs: InitVar[nnx.Rngs | None] = None

    def __post_init__(
        self, kernel_metadata: Metadata | None, bias_metadata: Metadata | None, rngs: nnx.Rngs | None
    ) -> None:
        for name, x in list(vars(self).items()):
            if isinstance(x, jax.Array | np.ndarray) and x.ndim == 0:  # as data it would be traced under jit
                super()._setattr(name, nnx.static(x.item()))
        self.check()
        rngs = checked_rngs(self, rngs)
        kernels = self._metadata("kernel_metadata", kernel_metadata)
        biases = self._metadata("bias_metadata", bias_metadata)
        for name in LAYERS:
            self._hold(name, self._new_layer(name, rngs, kernels.get(name, {}), biases.get(name, {})))
        for name in WEIGHTS:
            initializer, shape = self._weight_settings(name)
            made = None if shape is None else initializer(rngs.params(), shape, self.param_dtype)
            self._hold(name, None if made is None else nnx.Param(made, **kernels.get(name, {})))
        self._hold("rngs", new_stream(rngs) if self.attn_pdrop and self.keep_rngs else None)
        self._hold_cache({})

    __call__ = takes_rngs(AttentionLayer.__call__)

    def init_cache(self, batch: int, max_length: int, dtype: DTypeLike | None = None, *, calls: int = 1) -> None:
        """Gives this module an empty cache, see `mqa_jax.cache`. For a whole model see `mqa_jax.nnx.init_cache`.

        `dtype` defaults to `cache_dtype`, or else the module's; another float dtype than the queries' costs a
        conversion every step, 8 bits do not. `calls`: how often a step calls the module, each with a cache of its own.
        """
        self._check_assignment("cached_key")
        self._hold_cache(self._empty_caches(batch, max_length, dtype, calls))

    def set_view(
        self,
        deterministic: bool | None = None,
        decode: bool | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        cache_dtype: DTypeLike | None = None,
        calls: int = 1,
    ) -> None:
        """Used by `nnx.view`, which makes a module that shares all variables but the cache.

        Args:
          deterministic: if True, calls have no dropout.
          decode: if True, the view has a cache: an empty one of its own where sizes are given, else that of the module.
            If False, it has none. Cross-attention needs none; `only=` of `nnx.view` leaves it out.
          batch_size: rows of the cache.
          max_length: positions of each row. Ring buffers need none: they have as many slots as their windows need.
          cache_dtype: of the cached keys and values; default the setting of that name, or else the module's dtype.
          calls: how often one step calls the module, each time with a cache of its own.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        sizes = {"batch_size": batch_size, "max_length": max_length}
        if self.cache_layout == "ring" and batch_size is not None and max_length is None:
            max_length = sizes["max_length"] = 1
        given = [name for name, x in sizes.items() if x is not None]
        if given and (not decode or len(given) == 1):
            raise ValueError(
                "A view with a cache of its own needs decode=True, batch_size and max_length: "
                f"decode={decode}, batch_size={batch_size}, max_length={max_length}."
            )
        if batch_size is not None and max_length is not None:
            self._hold_cache(self._empty_caches(batch_size, max_length, cache_dtype, calls))
        elif decode and getattr(self, layout.KEY) is None:
            raise ValueError(
                "decode=True needs a cache, and this module has none: cached_key=None. Make one for the view with "
                "nnx.view(model, decode=True, batch_size=..., max_length=...), or for the model with "
                "mqa_jax.nnx.init_cache(model, batch, max_length)."
            )
        elif decode is False:
            self._hold_cache({})

    # -- what the layer asks ------------------------------------------------------------------------------------------

    def _layer(self, name: str) -> Callable[[Array], Array]:
        return getattr(self, name)

    def _weight(self, name: str) -> Array | None:
        weight = getattr(self, name)
        return None if weight is None else weight[...]

    def _dropout_key(self, deterministic: bool | None) -> Array | None:
        return dropout_key(self, deterministic)

    def _makes_parameters(self) -> bool:
        return False

    def _cache(self, call: Call) -> Cache | None:
        self._check_widths(call)
        if getattr(self, layout.KEY) is None:
            return None
        cache: Cache = {name: x[...] for name in layout.NAMES if (x := getattr(self, name)) is not None}
        others = tuple({name: x[...] for name, x in other.items()} for other in getattr(self, layout.OTHER_CALLS))
        return {**cache, layout.OTHER_CALLS: others} if others else cache

    def _store(self, cache: Cache) -> None:
        for name in layout.NAMES:
            if name in cache:
                getattr(self, name)[...] = cache[name]
        for held, new in zip(getattr(self, layout.OTHER_CALLS), cache.get(layout.OTHER_CALLS, ())):
            for name, x in held.items():
                x[...] = new[name]

    # -- what it holds ------------------------------------------------------------------------------------------------

    def _new_layer(self, name: str, rngs: nnx.Rngs, kernel: Mapping, bias: Mapping) -> nnx.Module | None:
        if name in ("q_ln", "k_ln"):
            if not (self.qk_ln or self.qk_gn):
                return None
            heads = 1 if self.qk_gn else self.heads if name == "q_ln" else self._kv_heads
            computing: dict[str, Any] = dict(epsilon=self.norm_eps, dtype=self.dtype)
            return Norm(heads * self._head_dim, self.norm_type, self.param_dtype, kernel, bias, **computing)
        if (name == "out" and not self.output_projection) or (
            name in ("key", "value") and not self.key_value_projections
        ):
            return None
        shape = self._dense_settings(name)
        return nnx.LinearGeneral(
            self._widths()[name],
            shape.pop("features"),
            **shape,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,  # type: ignore[arg-type]
            kernel_metadata=kernel,
            bias_metadata=bias,
            rngs=rngs,
        )

    def _widths(self) -> dict[str, Any]:
        key = self.in_kv_features or self.dim
        return dict(query=self.dim, key=key, value=self.in_v_features or key, out=(self.heads, self._head_dim))

    def _empty_caches(self, batch: int, max_length: int, dtype: DTypeLike | None, calls: int) -> dict[str, Any]:
        if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
            raise ValueError(f"calls is how often one step calls the module, an integer from 1 on: calls={calls!r}.")
        query: Any = self._layer("query")
        stacked = query.kernel.get_value().shape[:-3]  # by nnx.vmap, for nnx.scan

        def variable(x: Array) -> nnx.Cache:
            names = self.cache_sharding
            metadata: dict[str, Any] = (
                {} if names is None else {"out_sharding": (*[None] * len(stacked), *names[: x.ndim])}
            )
            return nnx.Cache(jnp.zeros((*stacked, *x.shape), x.dtype), **metadata)

        made = lambda: {name: variable(x) for name, x in self.new_cache(batch, max_length, dtype).items()}
        return {**made(), layout.OTHER_CALLS: tuple(made() for _ in range(calls - 1))}

    def _hold_cache(self, cache: Mapping[str, Any]) -> None:
        for name in layout.NAMES:
            self._hold(name, cache.get(name))
        self._hold(layout.OTHER_CALLS, cache.get(layout.OTHER_CALLS, ()))

    def _hold(self, name: str, x: Any) -> None:
        """As data even if it is None, because the structure of a module may not depend on what it holds."""
        super()._setattr(name, nnx.data(x))

    def _setattr(self, name: str, value: Any) -> None:
        self._check_assignment(name)
        super()._setattr(name, value)

    # -- what can be wrong --------------------------------------------------------------------------------------------

    def _check_assignment(self, name: str) -> None:
        if name not in STATE or not is_tree_mode(nnx):
            return
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(vars(self).get("query"))):
            raise ValueError(
                f"In tree mode an attribute that is assigned inside a transformation is lost after it: {name}. Assign "
                f"to the contents of its variable, {name}[...] = x, or make the cache outside, with nnx.view(model, "
                "decode=True, ...) or mqa_jax.nnx.init_cache(model, ...)."
            )

    def _check_widths(self, call: Call) -> None:
        if call.prev_layer_key_value is not None:
            return
        if not self.key_value_projections:
            raise ValueError(
                "This module has no keys and values of its own, key_value_projections=False: pass prev_layer_key_value."
            )
        inputs = {"x": call.x, "inputs_k": call.inputs_k, "inputs_v": call.inputs_v}
        given = [name for name, source in inputs.items() if source is not None]
        of_keys = "x" if call.inputs_k is None else "inputs_k"
        widths = self._widths()
        for name, setting, width in (
            (of_keys, "in_kv_features", widths["key"]),
            (given[-1], "in_v_features", widths["value"]),
        ):
            source: Any = inputs[name]
            shape = jnp.shape(source)
            if shape[-1:] != (width,) and not (name == "x" and width == self.dim):  # of which `Call` says more
                raise ValueError(
                    f"NNX makes parameters before it sees an input, and these are for another: {name}.shape={shape}, "
                    f"{setting}={width}. Pass {setting}={shape[-1] if shape else None} to the constructor."
                )

    def _metadata(self, argument: str, metadata: Metadata | None) -> Metadata:
        names = LAYERS if argument == "bias_metadata" else (*LAYERS, *WEIGHTS)
        unknown = sorted(set(metadata or {}) - set(names))
        if unknown:
            raise ValueError(
                f"{argument} has an entry for each parameter, by its name: found {unknown}, expected some of {names}."
            )
        return metadata or {}


@dataclass(eq=False, repr=False, kw_only=True)
class MultiQueryAttention(settings.MultiQuery, GroupedQueryAttention):
    """`GroupedQueryAttention` with one key/value head (Shazeer 2019, arXiv 1911.02150). See there for all settings."""


@dataclass(eq=False, repr=False, kw_only=True)
class MultiHeadAttention(settings.MultiHead, GroupedQueryAttention):
    """`GroupedQueryAttention` with a key/value head for each query head (Vaswani et al. 2017, arXiv 1706.03762)."""


@dataclass(eq=False, repr=False, kw_only=True)
class Attention(settings.OneHead, GroupedQueryAttention):
    """`GroupedQueryAttention` with one head, not causal, without output projection: softmax(q k / sqrt(H)) v.

    The output has head_dim features (knotgrass/attention, class `Attention`).
    """
