"""cuDNN's fused attention, through `jax.nn`, for the calls whose meaning in `jax.nn` is that of this library."""

import jax
import jax.numpy as jnp

from mqa_jax import masks
from mqa_jax.inputs import Inputs
from mqa_jax.shapes import Output, positions

_REMEDY = "use implementation=None"


def cannot(inputs: Inputs) -> str | None:
    """The reason why cuDNN cannot compute these inputs, or None if it can."""
    operands, mask, size = inputs.operands, inputs.mask, inputs.sizes
    unsupported = {
        f"dtype {inputs.dtype}": inputs.dtype in (jnp.float32, jnp.float64),
        "a value head size V different from H": size.V != size.H,
        "a head size H that is no multiple of 8": size.H % 8 != 0,
        "alibi_slopes": operands.alibi_slopes is not None,
        "sinks": operands.sinks is not None,
        "score_fn": inputs.score_fn is not None,
        "mask_fn": mask.function is not None,
        "logits_soft_cap": inputs.logits_soft_cap is not None,
        "dropout_rate (it takes no traced key)": inputs.dropout is not None,
        "query_offset": mask.query_offset is not None,
        "keys in a ring buffer": mask.ring is not None,
        "keys and values in 8 bits": operands.key_scale is not None,
        "segment ids": mask.query_segments is not None,
        "local_window_size without is_causal (its right limit is not supported)": mask.window is not None
        and not mask.is_causal,
        "no queries or keys": 0 in (size.T, size.S),
    }
    reasons = [reason for reason, applies in unsupported.items() if applies]
    return f"{'; '.join(reasons)}; {_REMEDY}" if reasons else None


def forward(inputs: Inputs) -> tuple[Output, None]:
    """Only the output: cuDNN rounds its log-sum-exp to the dtype of the query."""
    operands, mask, size = inputs.operands, inputs.mask, inputs.sizes
    try:
        out = jax.nn.dot_product_attention(
            operands.query,
            operands.key,
            operands.value,
            operands.bias,
            mask.allowed,
            scale=inputs.scale,
            is_causal=mask.is_causal,
            query_seq_lengths=mask.query_lengths,
            key_value_seq_lengths=mask.key_lengths,
            local_window_size=None if mask.reach[0] is None else (mask.reach[0], 0),
            implementation="cudnn",
        )
    except (RuntimeError, NotImplementedError) as error:
        raise NotImplementedError(
            f"implementation='cudnn' needs an NVIDIA GPU and cuDNN, and a call that jax.nn supports: {error} "
            f"(platform={jax.default_backend()!r}); {_REMEDY}."
        ) from error
    may_attend = masks.visible(mask, positions(size.T), positions(size.S))
    if may_attend is None:
        return out, None
    alive = jnp.any(may_attend, axis=-1).swapaxes(1, 2)[..., None]  # [#B, T, #N, 1]; cuDNN averages V in empty rows
    return jnp.where(alive, out, jnp.zeros((), out.dtype)), None
