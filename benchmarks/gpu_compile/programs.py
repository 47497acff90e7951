"""What is compiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

import mqa_jax
from benchmarks.model_shapes import MODEL_SHAPES, MULTI_QUERY, ModelShape, shape_of
from mqa_jax import functions
from mqa_jax.attention import inputs_of
from mqa_jax.inputs import Operands
from mqa_jax.kernels.triton import implementation as triton


@dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
      direction: "forward"; "backward", the gradients alone, for a cotangent that comes from outside; "tangent", the
        tangents of output and log-sum-exp; or "decode", a step with a cache, where each row of the batch is as long as
        an argument says.
      key_dtype: of keys and values, if not `dtype`; in 8 bits they come with scales.
      precision: of the products, as `dot_product_attention` takes it.
      added: whether a bias, slopes and a soft cap take part in the scores, in decoding a mask as well. Bias and mask
        have an entry for each query and key, and are shared by the heads.
      functions: whether T5's relative positions change the scores, and documents hide pairs.
    """

    shape: ModelShape
    direction: str
    dtype: str = "bfloat16"
    batch: int = 1  # B
    queries: int = 2048  # T
    keys: int = 2048  # S
    is_causal: bool = True
    implementation: str = "triton"
    key_dtype: str | None = None
    precision: str | None = None
    added: bool = False
    functions: bool = False

    def __str__(self) -> str:
        dtypes = self.dtype if self.key_dtype is None else f"{self.dtype}/{self.key_dtype}"
        dtypes += f" {self.precision}" if self.precision else ""
        dtypes += " added" if self.added else ""
        dtypes += " functions" if self.functions else ""
        sizes = f"B={self.batch} T={self.queries} S={self.keys}{' causal' if self.is_causal else ''}"
        return f"{self.shape.name} {dtypes} {self.direction} {sizes}"

    def arguments(self) -> dict[str, Any]:
        """Of `program`, by name."""
        value_dim = self.shape.value_dim or self.shape.head_dim
        query = (self.batch, self.queries, self.shape.heads)
        key = (self.batch, self.keys, self.shape.kv_heads)
        key_dtype = self.key_dtype or self.dtype
        arguments: dict[str, Any] = {
            "query": jax.ShapeDtypeStruct((*query, self.shape.head_dim), self.dtype),
            "key": jax.ShapeDtypeStruct((*key, self.shape.head_dim), key_dtype),
            "value": jax.ShapeDtypeStruct((*key, value_dim), key_dtype),
        }
        if self.direction == "backward":
            arguments["cotangent"] = jax.ShapeDtypeStruct((*query, value_dim), self.dtype)
        if self.direction == "decode":
            arguments |= dict.fromkeys(STEP, jax.ShapeDtypeStruct((self.batch,), "int32"))
        if self.key_dtype is not None:
            arguments |= dict.fromkeys(SCALES, jax.ShapeDtypeStruct(key, "float32"))
        if self.added:
            pairs = (self.batch, 1, self.queries, self.keys)
            arguments["bias"] = jax.ShapeDtypeStruct(pairs, self.dtype)
            if self.direction == "decode":
                arguments["mask"] = jax.ShapeDtypeStruct(pairs, "bool")
        if self.functions:
            arguments["table"] = jax.ShapeDtypeStruct((32, self.shape.heads), "float32")
            arguments["ids"] = jax.ShapeDtypeStruct((self.batch, self.keys), "int32")
        if self.direction == "tangent":
            arguments["tangents"] = dict(arguments)
        return arguments

    def program(self) -> Callable[..., Any]:
        programs: dict[str, Callable[..., Any]] = {"backward": self.gradients, "tangent": self.tangents}
        return programs.get(self.direction, self.output)

    def output(self, query: Array, key: Array, value: Array, **options: Any) -> Array:
        if self.functions:
            options["score_fn"] = functions.t5_causal, options.pop("table")
            options["mask_fn"] = functions.documents, options.pop("ids")
        return mqa_jax.dot_product_attention(
            query, key, value, **self.options(), implementation=self.implementation, **options
        )

    def options(self) -> dict[str, Any]:
        """That are no arguments of `program`."""
        return dict(
            is_causal=self.is_causal,
            local_window_size=None if self.shape.window is None else (self.shape.window - 1, 0),
            logits_soft_cap=20.0 if self.added else self.shape.soft_cap,
            alibi_slopes=mqa_jax.alibi_slopes(self.shape.heads) if self.shape.alibi or self.added else None,
            precision=self.precision,
        )

    def gradients(self, cotangent: Array, **arguments: Array) -> dict[str, Array]:
        ids = {name: arguments.pop(name) for name in ("ids",) if name in arguments}
        _, pull_back = jax.vjp(lambda arguments: self.output(**arguments, **ids), arguments)
        (gradients,) = pull_back(cotangent)
        return gradients

    def tangents(self, tangents: dict[str, Any], **arguments: Array) -> tuple[Array, Array]:
        """Of the Triton kernels."""
        inputs = inputs_of(**arguments, **self.options())
        return triton.tangent(inputs, *triton.forward(inputs), Operands(**tangents))


STEP = "key_value_seq_lengths", "query_offset"  # how long each row is, and where its query stands
SCALES = "key_scale", "value_scale"

DIRECTIONS = ("forward", "backward", "tangent")
TF32 = "TF32_TF32_F32", "TF32_TF32_F32_X3"

DECODE_SHAPES = tuple(
    shape_of(heads, kv_heads, head_dim)
    for heads, kv_heads in ((8, 8), (32, 8), (32, 1), (71, 1))
    for head_dim in (64, 128, 256)
)
DECODE_CASES = (
    *(
        Case(shape, "decode", batch=batch, queries=1, keys=keys, key_dtype=key_dtype)
        for shape in DECODE_SHAPES
        for batch in (1, 8, 64)
        for keys in (2048, 32768, 131072)
        for key_dtype in (None, "int8")
    ),
    # In a kernel these differ from int8 by how a number is converted.
    *(Case(shape, "decode", batch=8, queries=1, keys=32768, key_dtype="float8_e4m3fn") for shape in DECODE_SHAPES),
)
CASES = (
    *(Case(shape, direction) for shape in MODEL_SHAPES for direction in DIRECTIONS),
    *(
        Case(shape, direction, dtype)
        for shape in MODEL_SHAPES
        if shape.name in ("Llama-3-8B", "SmolLM2-135M")
        for dtype in ("float16", "float32")
        for direction in DIRECTIONS
    ),
    *(
        Case(shape_of(8, 2, head_dim), "backward", "float32", queries=1024, keys=1024, precision=precision, added=added)
        for head_dim in (64, 128, 256)
        for precision in TF32
        for added in (False, True)
    ),
    *(Case(shape_of(8, 2, head_dim), "tangent", queries=1024, keys=1024, added=True) for head_dim in (64, 128)),
    *(
        Case(shape_of(8, 2, head_dim), "decode", "float32", queries=8, keys=8192, precision=precision, added=added)
        for head_dim in (64, 128, 256)
        for precision in TF32
        for added in (False, True)
    ),
    # A mask and a bias that heads share, of the verification of a draft.
    Case(shape_of(64, 8, 128), "decode", batch=16, queries=16, keys=32768, added=True),
    *(Case(shape_of(32, 8, 128), direction, functions=True) for direction in ("forward", "backward")),
    Case(shape_of(32, 8, 128), "decode", batch=8, queries=8, keys=32768, functions=True),
    Case(MULTI_QUERY, "backward", batch=4, queries=4096, keys=4096),
    Case(MULTI_QUERY, "backward", queries=32768, keys=32768),
    *DECODE_CASES,
)
