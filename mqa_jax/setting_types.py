"""The types and ranges that the settings of modules may have, by name.

Without this check a wrong type fails late and in JAX's terms, or not at all: `causal="no"` would be true.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


def is_flag(x: Any) -> bool:
    return isinstance(x, bool | np.bool_)


def is_integer(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not is_flag(x)


def is_number(x: Any) -> bool:
    """Finite, and known when the module is made."""
    try:
        return not isinstance(x, str) and not is_flag(x) and math.isfinite(float(x))
    except (TypeError, OverflowError, jax.errors.ConcretizationTypeError):
        return False


def is_floating(x: DTypeLike) -> bool:
    try:
        return x is not None and bool(jnp.issubdtype(jnp.dtype(x), jnp.floating))
    except TypeError:
        return False


def is_made(x: Any) -> bool:
    """A function, or a callable instance; not a class."""
    return callable(x) and not isinstance(x, type)


Rule = tuple[str, Callable[[Any], bool]]
FLAG: Rule = ("True or False", is_flag)
INTEGER: Rule = ("an integer", is_integer)
COUNT: Rule = ("an integer from 1 on", lambda x: is_integer(x) and x >= 1)
NUMBER: Rule = ("a finite number", is_number)
POSITIVE: Rule = ("a finite number above 0", lambda x: is_number(x) and x > 0)
NOT_NEGATIVE: Rule = ("a finite number from 0 on", lambda x: is_number(x) and x >= 0)
RATE: Rule = ("a number from 0 to 1", lambda x: is_number(x) and 0 <= x <= 1)
FLOATING: Rule = ("a floating dtype", is_floating)
FUNCTION: Rule = ("a function", is_made)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("dim", "heads"), INTEGER),
    **dict.fromkeys(("d_model", "kv_heads", "head_dim", "out_features", "embed_dim", "num_heads"), COUNT),
    **dict.fromkeys(("qk_ln", "qk_gn", "causal", "sinks", "add_bias_kv", "add_zero_attn", "use_bias"), FLAG),
    **dict.fromkeys(
        ("use_out_bias", "output_projection", "deterministic", "flash", "bias", "batch_first", "interleaved"), FLAG
    ),
    **dict.fromkeys(("attn_pdrop", "dropout"), RATE),
    **dict.fromkeys(("clip_qkv", "norm_eps"), NOT_NEGATIVE),
    **dict.fromkeys(("alibi_bias_max", "logits_soft_cap", "theta", "factor", "floor_scale"), POSITIVE),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), POSITIVE),
    **dict.fromkeys(("softmax_scale", "attn_scale"), NUMBER),
    **dict.fromkeys(("dtype", "param_dtype"), FLOATING),
    **dict.fromkeys(("kernel_init", "bias_init", "out_kernel_init", "out_bias_init"), FUNCTION),
    "rope": ("positions such as mqa_jax.Rope()", is_made),
    "scaling": ("such as mqa_jax.LinearScaling(factor=2.0)", is_made),
    "attn_temperature_tuning": ("such as mqa_jax.TemperatureTuning()", is_made),
    "verbose": ("a number or a flag", lambda x: is_flag(x) or is_number(x)),
    "alibi": ("True, False or 'falcon'", lambda x: is_flag(x) or (isinstance(x, str) and x == "falcon")),
}
OPTIONAL = {
    *("d_model", "kv_heads", "head_dim", "out_features", "use_out_bias", "deterministic", "clip_qkv", "softmax_scale"),
    *("scaling", "rope", "attn_temperature_tuning", "logits_soft_cap", "dtype"),
    *("out_kernel_init", "out_bias_init"),
}


def check_types(settings: Any) -> None:
    """Checks each field of a dataclass whose name is in `RULES`, independently of the others."""
    for name in type(settings).__dataclass_fields__:
        x = getattr(settings, name, None)
        if name not in RULES or (x is None and name in OPTIONAL):
            continue
        rule, holds = RULES[name]
        if not holds(x):
            none = ", or None" if name in OPTIONAL else ""
            raise ValueError(f"{type(settings).__name__}: {name} must be {rule}{none}: {name}={x!r}.")
