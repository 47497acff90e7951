"""Names that mqa's and zeta's modules have, and that a new module would not: kept so that their calls run unchanged.

    d_model                 dim
    attn_impl="triton"      None, the fastest for the platform; the implementation of that name needs a GPU
    attn_impl="flash"       None
    attn_impl="torch"       "xla": what is computed without a kernel of its own
    fc_type                 only "torch", a plain dense layer
    device                  nothing: JAX computes where its arrays are
    verbose                 a line to stderr for each trace
    attention_mask=         mask=, in a call

The rest of this library reads `dim`, `mask` and what `implementation_of` returns.
"""

import sys
import warnings
from dataclasses import dataclass
from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Array

from mqa_jax.attention import IMPLEMENTATIONS

UPSTREAM_IMPLEMENTATIONS = {"torch": "xla", "flash": None, "triton": None}


@dataclass(eq=False, repr=False)
class UpstreamSettings:
    """Upstream's settings with its defaults, in the order of its constructor, in which `dim` is called `d_model`."""

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


def implementation_of(attn_impl: str | None) -> str | None:
    """The `implementation` of `dot_product_attention` that a module's `attn_impl` means."""
    if isinstance(attn_impl, str) and attn_impl in UPSTREAM_IMPLEMENTATIONS:
        return UPSTREAM_IMPLEMENTATIONS[attn_impl]
    if attn_impl is None or (isinstance(attn_impl, str) and attn_impl in IMPLEMENTATIONS):
        return attn_impl
    names = [None, *dict.fromkeys([*UPSTREAM_IMPLEMENTATIONS, *IMPLEMENTATIONS])]
    raise ValueError(f"Unknown attn_impl={attn_impl!r}: use one of {names}.")


def check_names(settings: UpstreamSettings) -> None:
    """Makes `dim` and `d_model` one, and refuses what upstream's names cannot mean here."""
    name, dim = type(settings).__name__, settings.d_model or settings.dim
    if dim < 1 or settings.heads < 1:
        raise ValueError(
            f"{name} needs dim (or d_model, the same under another name) and heads: "
            f"dim={settings.dim}, d_model={settings.d_model}, heads={settings.heads}."
        )
    if settings.dim not in (0, dim):
        raise ValueError(
            f"dim and d_model are two names of one setting: dim={settings.dim}, d_model={settings.d_model}. Give one; "
            "to clone a module that has both, change both."
        )
    object.__setattr__(settings, "dim", dim)  # modules of linen are frozen
    implementation_of(settings.attn_impl)
    if settings.fc_type != "torch":
        raise ValueError(f"Unknown fc_type={settings.fc_type!r}: 'torch', a plain dense layer, is the only one.")


def one_mask(mask: ArrayLike | None, attention_mask: ArrayLike | None) -> tuple[str, ArrayLike | None]:
    """The mask of a call, and under which name it came."""
    if mask is not None and attention_mask is not None:
        raise ValueError("mask and attention_mask are two names of one argument: pass one.")
    return ("attention_mask", attention_mask) if mask is None else ("mask", mask)


def announce(settings: UpstreamSettings, x: Array, kv_heads: int, head_dim: int) -> None:
    """What `device` and `verbose` do."""
    if settings.device is not None:
        warnings.warn(
            f"device={settings.device!r} has no effect: JAX computes where its arrays are. Place them with "
            "jax.device_put(x, device), or with shardings under jax.jit.",
            stacklevel=4,
        )
    if settings.verbose > 0:
        name = getattr(settings, "name", None) or ""  # which modules of linen have
        print(
            f"{type(settings).__name__} {name}: {x.shape=}, dtype={x.dtype}, heads={settings.heads}, "
            f"kv_heads={kv_heads}, head_dim={head_dim}, attn_impl={settings.attn_impl!r}",
            file=sys.stderr,
        )
