"""The meaning of `precision` in the Triton kernels: for each dtype of the query, the products for each precision.

The kernels have four kinds of matrix products, all with float32 sums. For 16-bit numbers (keys and values in 8 bits are
converted to them) there is one kind, with exact products: it serves every precision that rounds neither the numbers nor
the sums. The weights are rounded to 16 bits before the product with the values, for every precision
(`Inputs.weight_dtype`). A precision that is not in the table, e.g. sums of 16 bits, is refused.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from mqa_jax.inputs import Inputs

Requested = lax.Precision | lax.DotAlgorithmPreset
Products = lax.Precision | lax.DotAlgorithmPreset  # the `precision` of Pallas

FULL = lax.Precision.HIGHEST  # of float32
TF32 = lax.Precision.HIGH  # of float32 rounded to tf32: 10 bits of mantissa, on the tensor cores
TF32_3X = lax.DotAlgorithmPreset.TF32_TF32_F32_X3  # three products of tf32 for one, almost as precise as float32
EXACT = lax.Precision.DEFAULT  # of 16-bit numbers, on the tensor cores

_Preset = lax.DotAlgorithmPreset
_PRECISIONS = (lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST)
# tf32 and float32 represent bfloat16 and float16 exactly, and the corrections that _X3, _X6 and _X9 add for bfloat16
# are 0: these precisions do not round.
_WIDER = (_Preset.DEFAULT, _Preset.TF32_TF32_F32, _Preset.TF32_TF32_F32_X3, _Preset.F32_F32_F32)
_OF_BFLOAT16 = (_Preset.BF16_BF16_F32, _Preset.BF16_BF16_F32_X3, _Preset.BF16_BF16_F32_X6, _Preset.BF16_BF16_F32_X9)

TABLE: dict[str, dict[Requested, Products]] = {
    "float32": {
        _Preset.DEFAULT: FULL,  # "an algorithm will be selected"; also for precision=None
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
KINDS = {FULL: "float32", TF32: "tf32", TF32_3X: "tf32x3", EXACT: "16-bit"}  # their names in `tile_table.json`


def products_of(inputs: Inputs) -> Products:
    found = _found(inputs)
    assert found is not None  # `refusal` had no reason
    return found


def refusal(inputs: Inputs) -> str | None:
    """The reason why the precision is not supported; None if it is, or if the dtype is not (a separate error)."""
    if jnp.dtype(inputs.dtype).name not in TABLE or _found(inputs) is not None:
        return None
    names = ", ".join(dict.fromkeys(str(one) for one in requested(inputs)))
    kinds = "float32 or tf32" if inputs.dtype == jnp.float32 else f"unrounded {jnp.dtype(inputs.dtype).name}"
    return f"products of {kinds} with float32 sums only (precision={names})"


def _found(inputs: Inputs) -> Products | None:
    meanings = TABLE[jnp.dtype(inputs.dtype).name]
    found = {meanings.get(one) for one in requested(inputs)}
    return found.pop() if len(found) == 1 else None


def requested(inputs: Inputs) -> list[Any]:
    """The precision of each side of a product, or one of both."""
    precision: Any = inputs.precision
    is_pair = isinstance(precision, tuple | list) and not isinstance(precision, lax.DotAlgorithm)  # a tuple, too
    return [_by_name(one) for one in (precision if is_pair else (precision,))]


def _by_name(precision: Any) -> Any:
    if precision is None:
        return _Preset.DEFAULT
    if not isinstance(precision, str):
        return precision  # a Precision or a preset; or a `lax.DotAlgorithm`, which is in no table
    presets = lax.DotAlgorithmPreset.__members__
    return presets[precision] if precision in presets else lax.Precision(precision)
