"""What `precision` means to the Triton kernels: for each dtype of the query, which products answer to which wish.

The kernels have four kinds of matrix products, all with float32 sums. Of 16-bit numbers (keys and values in 8 bits
become such) there is one kind, whose products are exact: it is what every wish means that rounds neither them nor the
sums. The weights that meet the values have been rounded to 16 bits then, whatever is wished (`Inputs.weight_dtype`).
What is not in the table, e.g. sums of 16 bits, is refused.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mqa_jax.inputs import Inputs

Wish = lax.Precision | lax.DotAlgorithmPreset
Products = lax.Precision | lax.DotAlgorithmPreset  # as Pallas wants to be told

FULL = lax.Precision.HIGHEST  # of float32
TF32 = lax.Precision.HIGH  # of float32 rounded to tf32: 10 bits of mantissa, on the tensor cores
TF32_3X = lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # three products of tf32 for one, almost as good as float32
EXACT = lax.Precision.DEFAULT  # of 16-bit numbers, on the tensor cores

_Preset = lax.DotAlgorithmPreset
_PRECISIONS = (lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST)
# bfloat16 and float16 are numbers of tf32 and of float32, and the corrections that _X3, _X6 and _X9 add to bfloat16
# are 0: they lose nothing.
_WIDER = (_Preset.DEFAULT, _Preset.TF32_TF32_F32, _Preset.TF32_TF32_F32_X3, _Preset.F32_F32_F32)
_OF_BFLOAT16 = (_Preset.BF16_BF16_F32, _Preset.BF16_BF16_F32_X3, _Preset.BF16_BF16_F32_X6, _Preset.BF16_BF16_F32_X9)

TABLE: dict[str, dict[Wish, Products]] = {
    "float32": {
        _Preset.DEFAULT: FULL,  # "an algorithm will be selected"; so is no wish at all
        _Preset.F32_F32_F32: FULL,
        lax.Precision.HIGHEST: FULL,
        lax.Precision.HIGH: TF32,  # what JAX documents for GPUs
        lax.Precision.DEFAULT: TF32,
        _Preset.TF32_TF32_F32: TF32,
        _Preset.TF32_TF32_F32_X3: TF32_3X,
    },
    "bfloat16": dict.fromkeys((*_PRECISIONS, *_WIDER, *_OF_BFLOAT16), EXACT),
    "float16": dict.fromkeys((*_PRECISIONS, *_WIDER, _Preset.F16_F16_F32), EXACT),
}
KINDS = {FULL: "float32", TF32: "tf32", TF32_3X: "tf32x3", EXACT: "16-bit"}  # as `tile_table.json` calls them


def products_of(inputs: Inputs) -> Products:
    found = _found(inputs)
    if found is None:  # not what `refusal` was asked of: the backward pass may be traced under another configuration
        raise NotImplementedError(f"The Triton kernels compute {refusal(inputs)}.")
    return found


def refusal(inputs: Inputs) -> str | None:
    """Why not, or None if the kernels have such products, or not even such numbers."""
    if jnp.dtype(inputs.dtype).name not in TABLE or _found(inputs) is not None:
        return None
    wished = ", ".join(dict.fromkeys(str(one) for one in wishes(inputs)))
    kinds = "float32 or tf32" if inputs.dtype == jnp.float32 else f"unrounded {jnp.dtype(inputs.dtype).name}"
    return f"products of {kinds} with float32 sums only (precision={wished})"


def _found(inputs: Inputs) -> Products | None:
    meanings = TABLE[jnp.dtype(inputs.dtype).name]
    found = {meanings.get(one) for one in wishes(inputs)}
    return found.pop() if len(found) == 1 else None


def wishes(inputs: Inputs) -> list[Any]:
    """One for each side of a product, or one for both; without any, what JAX is configured for."""
    default = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    wished: Any = default if inputs.precision is None else inputs.precision
    is_pair = isinstance(wished, tuple | list) and not isinstance(wished, lax.DotAlgorithm)  # which is a tuple, too
    return [_wish(one) for one in (wished if is_pair else (wished,))]


def _wish(wished: Any) -> Any:
    if wished is None:
        return _Preset.DEFAULT
    if not isinstance(wished, str):
        return wished  # a Precision or a preset; or a `lax.DotAlgorithm`, which is in no table
    presets = lax.DotAlgorithmPreset.__members__
    return presets[wished] if wished in presets else lax.Precision(wished)
