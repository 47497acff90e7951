"""The settings of the attention modules, and which of them are legal."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, lecun_normal, zeros
from jax.typing import DTypeLike

from mqa_jax.cache import layout
from mqa_jax.layer import upstream
from mqa_jax.layer.cut_sequence import SequenceAxis, SequenceAxisSetting
from mqa_jax.mask_checks import checked_window
from mqa_jax.positions import Rope, TemperatureTuning
from mqa_jax.setting_types import check_types

NORM_TYPES = ("layernorm", "low_precision_layernorm", "rmsnorm", "low_precision_rmsnorm")


@dataclass(eq=False, repr=False)
class AttentionSettings(upstream.UpstreamSettings):
    """Settings and defaults are those of mqa's and zeta's `MultiQueryAttention` (dim to device), then llm-foundry's and
    Flax's. Axis letters are those of `mqa_jax.shapes`: D = dim, N = heads, K = kv_heads, H = head_dim.

    Attributes:
      dim: features of the model, D; required. `d_model` is another name for it.
      heads: query heads, N; required.
      attn_impl: upstream's "triton" and "flash" (the fastest for the platform) or "torch" (plain XLA), or an
        `implementation` of `dot_product_attention`, None included.
      clip_qkv: clamp queries, keys and values to [-clip_qkv, clip_qkv] after their projection. None or 0 is off.
      qk_ln: normalise queries and keys, over all heads together.
      softmax_scale: default 1 / sqrt(head_dim).
      attn_pdrop: dropout rate of the attention weights; its random key is the `dropout` collection or stream.
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
      deterministic, dtype, param_dtype, precision, kernel_init, bias_init: as in Flax.
      out_kernel_init, out_bias_init: of the output projection, whose kernel `[N, H, D]` and bias `[D]` have other axes
        than those of the others, `[D, N, H]` and `[N, H]`; by default the same.
      sequence_axis: the mesh axis over which the sequence is cut, its name or a `SequenceAxis`; None does not cut it.
        A cache is then cut over its positions.
    """

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
    kernel_init: Initializer = lecun_normal()
    bias_init: Initializer = zeros
    out_kernel_init: Initializer | None = None
    out_bias_init: Initializer | None = None
    sequence_axis: SequenceAxisSetting = None

    @property
    def _kv_heads(self) -> int:
        """K."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _head_dim(self) -> int:
        """H."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def _window(self) -> tuple[int | None, int | None] | None:
        return checked_window(self.local_window_size)

    def check(self) -> None:
        """Everything that can be said about the settings before a call; also makes `d_model` and `dim` one."""
        check_settings(self)


@dataclass(eq=False, repr=False)
class MultiQuery(AttentionSettings):
    kv_heads: int | None = 1

    def check(self) -> None:
        _check_fixed(self, kv_heads=1)
        super().check()


@dataclass(eq=False, repr=False)
class MultiHead(AttentionSettings):
    def check(self) -> None:
        _check_fixed(self, kv_heads=self.heads)
        super().check()


@dataclass(eq=False, repr=False)
class OneHead(MultiQuery):
    heads: int = 1
    causal: bool = False
    output_projection: bool = False


def check_settings(settings: AttentionSettings) -> None:
    check_types(settings)
    upstream.check_names(settings)
    _check_heads(settings)
    checked_window(settings.local_window_size)
    SequenceAxis.of(settings.sequence_axis)
    _check_cache(settings)
    _check_falcon(settings)
    if settings.norm_type not in NORM_TYPES:
        raise ValueError(f"Unknown norm_type={settings.norm_type!r}: use one of {', '.join(NORM_TYPES)}.")
    if settings.qk_ln and settings.qk_gn:
        raise ValueError("qk_ln normalises over all heads, qk_gn each head: qk_ln=True, qk_gn=True. Choose one.")
    if not settings.output_projection and (settings.out_features is not None or settings.use_out_bias):
        raise ValueError(
            "There are no features and no bias of an output projection that is left out: output_projection=False, "
            f"out_features={settings.out_features}, use_out_bias={settings.use_out_bias}."
        )
    if settings.add_bias_kv and (settings.attn_pdrop or settings.logits_soft_cap):
        raise NotImplementedError(
            "add_bias_kv works without dropout and soft cap only: "
            f"attn_pdrop={settings.attn_pdrop}, logits_soft_cap={settings.logits_soft_cap}."
        )


def _check_fixed(settings: AttentionSettings, kv_heads: int) -> None:
    if settings.kv_heads not in (None, kv_heads):
        raise ValueError(
            f"{type(settings).__name__} has {kv_heads} key/value head(s): kv_heads={settings.kv_heads}. "
            "Use GroupedQueryAttention for any other number."
        )


def _check_heads(settings: AttentionSettings) -> None:
    dim, heads, kv_heads = settings.dim, settings.heads, settings.kv_heads
    if settings.head_dim is None and dim % heads:
        raise ValueError(f"dim must be a multiple of heads: dim={dim}, heads={heads}. Or give head_dim.")
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads: heads={heads}, kv_heads={kv_heads}.")


def _check_cache(settings: AttentionSettings) -> None:
    if settings.cache_layout not in layout.LAYOUTS:
        raise ValueError(f"Unknown cache_layout={settings.cache_layout!r}: use one of {layout.LAYOUTS}.")
    if settings.cache_dtype is not None:
        layout.check_dtype(settings.cache_dtype)
    left, _ = settings._window or (None, None)
    if settings.cache_layout == "ring" and left is None:
        raise ValueError(
            "A ring buffer holds a window and forgets what came before: cache_layout='ring' needs local_window_size, "
            f"local_window_size={settings.local_window_size}. Or use cache_layout='static'."
        )


def _check_falcon(settings: AttentionSettings) -> None:
    if settings.alibi == "falcon" and (settings.alibi_bias_max != 8 or settings.cache_layout == "ring"):
        raise NotImplementedError(
            "Falcon's ALiBi has alibi_bias_max=8, and needs keys in the order of their positions, which the slots of a "
            f"ring buffer are not in: alibi='falcon', alibi_bias_max={settings.alibi_bias_max}, "
            f"cache_layout={settings.cache_layout!r}."
        )
