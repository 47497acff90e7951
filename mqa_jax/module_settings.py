"""Which settings of the attention modules are legal."""

from typing import Any

from mqa_jax import kv_cache
from mqa_jax.attention import IMPLEMENTATIONS
from mqa_jax.checks import checked_window
from mqa_jax.norms import check_norm_type
from mqa_jax.setting_types import check_types

# Upstream's names for the way attention is computed: "torch" was plain PyTorch, the other two fused GPU kernels. Models
# are to run with them on every platform, so "triton" is not the implementation of that name, which wants a GPU.
UPSTREAM_IMPLEMENTATIONS = {"torch": "xla", "flash": None, "triton": None}


def implementation_of(attn_impl: str | None) -> str | None:
    """The `implementation` of `dot_product_attention` that a module's `attn_impl` means."""
    if isinstance(attn_impl, str) and attn_impl in UPSTREAM_IMPLEMENTATIONS:
        return UPSTREAM_IMPLEMENTATIONS[attn_impl]
    if attn_impl is None or (isinstance(attn_impl, str) and attn_impl in IMPLEMENTATIONS):
        return attn_impl
    names = [None, *dict.fromkeys([*UPSTREAM_IMPLEMENTATIONS, *IMPLEMENTATIONS])]
    raise ValueError(f"Unknown attn_impl={attn_impl!r}: use one of {names}.")


def check_kv_heads(module: Any, allowed: int | None) -> None:
    if module.kv_heads not in (None, allowed):
        raise ValueError(
            f"{type(module).__name__} has {allowed} key/value head(s): kv_heads={module.kv_heads}. "
            "Use GroupedQueryAttention for any other number."
        )


def _check_cache(module: Any) -> None:
    if module.cache_layout not in kv_cache.LAYOUTS:
        raise ValueError(f"Unknown cache_layout={module.cache_layout!r}: use one of {kv_cache.LAYOUTS}.")
    if module.cache_dtype is not None:
        kv_cache.check_dtype(module.cache_dtype)
    left, _ = checked_window(module.local_window_size) or (None, None)
    if module.cache_layout == "ring" and left is None:
        raise ValueError(
            "A ring buffer holds a window and forgets what came before: cache_layout='ring' needs local_window_size, "
            f"local_window_size={module.local_window_size}. Or use cache_layout='static'."
        )


def _check_falcon(module: Any) -> None:
    if module.alibi == "falcon" and (module.alibi_bias_max != 8 or module.cache_layout == "ring"):
        raise NotImplementedError(
            "Falcon's ALiBi has alibi_bias_max=8, and needs keys in the order of their positions, which a ring buffer "
            f"has not: alibi='falcon', alibi_bias_max={module.alibi_bias_max}, cache_layout={module.cache_layout!r}."
        )


def _check_heads(module: Any, dim: int) -> None:
    if module.head_dim is None and dim % module.heads:
        raise ValueError(f"dim must be a multiple of heads: dim={dim}, heads={module.heads}. Or give head_dim.")
    if module.kv_heads is not None and module.heads % module.kv_heads:
        raise ValueError(f"heads must be a multiple of kv_heads: heads={module.heads}, kv_heads={module.kv_heads}.")


def check_settings(module: Any) -> None:
    """Everything that can be said about the settings before a call; also makes `d_model` and `dim` one."""
    check_types(module)
    name, dim = type(module).__name__, module.d_model or module.dim
    if dim < 1 or module.heads < 1:
        raise ValueError(
            f"{name} needs dim (or d_model, the same under another name) and heads: "
            f"dim={module.dim}, d_model={module.d_model}, heads={module.heads}."
        )
    if module.dim not in (0, dim):
        raise ValueError(
            f"dim and d_model are two names of one setting: dim={module.dim}, d_model={module.d_model}. Give one; "
            "to clone a module that has both, change both."
        )
    object.__setattr__(module, "dim", dim)
    _check_heads(module, dim)
    implementation_of(module.attn_impl)
    checked_window(module.local_window_size)
    _check_cache(module)
    _check_falcon(module)
    if module.fc_type != "torch":
        raise ValueError(f"Unknown fc_type={module.fc_type!r}: 'torch', a plain dense layer, is the only one.")
    check_norm_type(module.norm_type)
    if module.qk_ln and module.qk_gn:
        raise ValueError("qk_ln normalises over all heads, qk_gn each head: qk_ln=True, qk_gn=True. Choose one.")
    if not module.output_projection and (module.out_features is not None or module.use_out_bias):
        raise ValueError(
            "There are no features and no bias of an output projection that is left out: output_projection=False, "
            f"out_features={module.out_features}, use_out_bias={module.use_out_bias}."
        )
    if module.add_bias_kv and (module.attn_pdrop or module.logits_soft_cap):
        raise NotImplementedError(
            "add_bias_kv works without dropout and soft cap only: "
            f"attn_pdrop={module.attn_pdrop}, logits_soft_cap={module.logits_soft_cap}."
        )
