"""`FlashAttention` and `FlashMHA` as `flax.nnx` modules."""

from dataclasses import InitVar, dataclass
from typing import Any

from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from mqa_jax.layer.flash import FlashAttentionLayer, FlashMHASettings
from mqa_jax.nnx.attention import GroupedQueryAttention
from mqa_jax.nnx.random import dropout_key, new_stream, takes_rngs
from mqa_jax.setting_types import check_types


@dataclass(eq=False, repr=False)
class FlashAttention(FlashAttentionLayer, nnx.Module):
    __doc__ = f"""{(FlashAttentionLayer.__doc__ or "").rstrip()}
      rngs: `nnx.Rngs`, for dropout alone; may be given to the call instead.
    """

    rngs: InitVar[nnx.Rngs | None] = None

    def __post_init__(self, rngs: nnx.Rngs | None) -> None:
        check_types(self)
        self._setattr("rngs", nnx.data(new_stream(rngs) if self.dropout else None))

    __call__ = takes_rngs(FlashAttentionLayer.__call__)

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`.

        Args:
          deterministic: if True, calls have no dropout.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _dropout_key(self, deterministic: bool | None) -> Array | None:
        return dropout_key(self, deterministic)


class FlashMHA(GroupedQueryAttention):
    __doc__ = f"""{(FlashMHASettings.__doc__ or "").rstrip()}
      rngs, and all that `GroupedQueryAttention` has beside its settings: as there.
    """

    def __init__(
        self,
        *settings: Any,
        rngs: nnx.Rngs | None = None,
        keep_rngs: bool = True,
        in_kv_features: int | None = None,
        in_v_features: int | None = None,
        **named: Any,
    ):
        flash = FlashMHASettings(*settings, **named)
        check_types(flash)
        super().__init__(
            **flash.attention_settings(),
            rngs=rngs,
            keep_rngs=keep_rngs,
            in_kv_features=in_kv_features,
            in_v_features=in_v_features,
        )

    def __call__(  # type: ignore[override]
        self,
        query: Float[ArrayLike, "B T D"],
        key: Float[ArrayLike, "B S _"] | None = None,
        value: Float[ArrayLike, "B S _"] | None = None,
        *,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Float[Array, "B T D"]:
        """Key defaults to query, value to key. Returns `[B, T, D]`."""
        options: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        out, _, _ = super().__call__(query, inputs_k=key, inputs_v=value, **options)
        return out
