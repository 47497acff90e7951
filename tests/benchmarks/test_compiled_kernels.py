"""What the compilers for NVIDIA GPUs make of our kernels."""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks import gpu_compile
from benchmarks.gpu_compile import (
    CASES,
    TARGETS,
    TF32,
    Case,
    Result,
)
from benchmarks.model_shapes import MULTI_QUERY, shape_of
from mqa_jax.inputs import Inputs, Operands
from mqa_jax.kernels import gpu
from mqa_jax.kernels.triton import decode, tile_config
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.masks import Mask

# Each program costs seconds, so: the sizes that differ most, other dtypes once, and the backward pass, which has the
# forward kernel in it as well.
DIFFERENT = ("Llama-3-8B", "SmolLM2-135M", "Gemma-2B", "Phi-2")
COMPILED = [
    case
    for case in CASES
    if case.shape == MULTI_QUERY
    or (case.direction in ("backward", "tangent") and case.shape.name in DIFFERENT and case.dtype == "bfloat16")
    or (case.shape.name == "SmolLM2-135M" and (case.direction != "forward" or case.dtype == "bfloat16"))
]
MANY_KEYS = Case(shape_of(32, 1, 128), "decode", batch=1, queries=1, keys=32768)  # for one row of the batch
DECODED = [
    MANY_KEYS,
    replace(MANY_KEYS, key_dtype="int8"),
    *(
        Case(shape_of(heads, kv_heads, head_dim), "decode", "bfloat16", batch, 1, keys, key_dtype=key_dtype)
        for heads, kv_heads, head_dim, batch, keys, key_dtype in (
            (8, 8, 64, 64, 2048, None),  # enough programs without splits
            (32, 8, 128, 8, 131072, None),
            (32, 8, 128, 8, 131072, "int8"),
            (71, 1, 64, 8, 32768, None),  # more rows than a tile has
            (71, 1, 256, 8, 32768, None),
            (32, 1, 256, 8, 32768, "float8_e4m3fn"),
        )
    ),
]
IN_TF32 = [case for case in CASES if case.precision is not None and (case.added or case.direction == "decode")]
MASKED = [case for case in CASES if case.added and case.dtype == "bfloat16"]
OF_FUNCTIONS = [case for case in CASES if case.functions]
# All of them for the two GPUs that most people have; for the others the largest tiles and the fewest programs.
FULLY = "a100", "h100"
LARGEST = [
    case for case in COMPILED if case.direction != "forward" and case.shape.name in ("Llama-3-8B", "Gemma-2B")
] + [MANY_KEYS, *DECODED[-2:]]
WITHOUT_FLOAT8 = ("a100",)
FULL_FLOAT32 = ("a100",)  # unrolled multiplications take long to compile
KERNELS = {
    "forward": ("mqa_forward",),
    "backward": ("mqa_forward", "mqa_dq", "mqa_dkv"),
    "tangent": ("mqa_forward", "mqa_tangent"),
    "decode": ("mqa_decode",),
}
TENSOR_CORES = {"h100": "wgmma", "b200": "tcgen05"}  # the instructions without which they run at half speed, or less
WITHOUT_SPILLS = (64, 128)  # head sizes; in decoding all
SPILLS_OF_FUNCTIONS = {"h100": 128, "b200": 640}  # bytes, where logarithms are in the loop; elsewhere none
SPILLS_OF_3X = 128  # bytes, of three products of tf32 at once: L40S and H100 need a few where something is added
TEMPORARY_MIB = {4096: 200, 32768: 340}  # by length; the output alone takes 128 and 256
ROUNDING = 1024  # bytes, as each buffer begins at a multiple of 128 or 256


def complaints(case: Case, result: Result) -> list[str]:
    """What is wrong with the kernels of a case."""
    if result.error is not None:
        return [result.error]
    found = [
        f"there is no kernel {name}"
        for name in KERNELS[case.direction]
        if not any(kernel.name.startswith(name) for kernel in result.kernels)
    ]
    most = TARGETS[result.target].block_shared_memory
    instruction = TENSOR_CORES.get(result.target)
    for kernel in result.kernels:
        small = case.shape.head_dim in WITHOUT_SPILLS or (case.direction == "decode" and case.precision is None)
        judged = case.dtype == "bfloat16" or case.precision is not None
        of_functions = SPILLS_OF_FUNCTIONS.get(result.target, 0) if case.functions else 0
        if judged and small and kernel.spills > (SPILLS_OF_3X if case.precision == TF32[1] else of_functions):
            found.append(f"{kernel.name} spills {kernel.spills} bytes")
        if kernel.serialized:
            found.append(f"{kernel.name} waits for each wgmma before the next")
        if kernel.shared_memory > most:
            found.append(f"{kernel.name} takes {kernel.shared_memory} bytes of shared memory; there are {most}")
        multiplies = case.dtype != "float32" and kernel.name.startswith((*KERNELS["backward"], "mqa_tangent"))
        if instruction and multiplies and not getattr(kernel, instruction):
            found.append(f"{kernel.name} has no {instruction}")
    if case.shape == MULTI_QUERY and (result.temporaries or 0) > TEMPORARY_MIB[case.queries] << 20:
        found.append(f"{result.temporaries} bytes of temporaries")
    return found + (complaints_of_decoding(case, result) if case.direction == "decode" else [])


def complaints_of_decoding(case: Case, result: Result) -> list[str]:
    """Reading the cache once and in place is all there is to decoding."""
    found = []
    multiprocessors = TARGETS[result.target].multiprocessors
    for kernel in result.kernels:
        if kernel.name.startswith("mqa_decode"):
            if not kernel.async_copies:
                found.append(f"{kernel.name} computes nothing while it waits for keys")
            if case == MANY_KEYS and kernel.programs < multiprocessors:
                found.append(
                    f"{kernel.name} has {kernel.programs} programs; there are {multiprocessors} multiprocessors"
                )
    most = most_temporaries(case, result.target)
    if case.functions:  # three numbers for each tile of keys, from which the table of tiles is made
        most += case.batch * case.keys
    if (result.temporaries or 0) > most:
        found.append(f"{result.temporaries} bytes of temporaries; {most} are enough")
    return found


def most_temporaries(case: Case, target: str) -> int:
    """What the splits find, four numbers for each tile of rows, and no array but of the size of query and output.

    These two are copied where heads of a group have to be brought together, and log-sum-exps are written in any case.
    """
    arguments: dict[str, Any] = dict(case.arguments())  # shapes, as good as arrays here
    inputs = Inputs(
        Operands(arguments["query"], arguments["key"], arguments["value"]), Mask(), precision=case.precision
    )
    size = inputs.sizes
    with gpu.assuming(TARGETS[target].architecture):
        row_tiles = decode.row_tiles_of(size, tile_config.choose("decode", inputs, rows=size.T * size.G))
    partials = decode.partial_bytes(size, decode.splits_of(size, row_tiles))
    copies = size.B * size.T * size.N * (arguments["query"].dtype.itemsize * (size.H + size.V) + 4)
    return partials + 16 * size.B * row_tiles + copies + ROUNDING


@pytest.mark.slow
@pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing()))
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_well_for(target, one_in):
    """One test for each GPU, since a compiler's process is started once for all programs."""
    cases = [*COMPILED, *DECODED, *MASKED] if target in FULLY else LARGEST
    cases = [case for case in cases if case.dtype != "float32" or target in FULL_FLOAT32] + IN_TF32 + OF_FUNCTIONS
    cases = [case for case in cases if case.key_dtype != "float8_e4m3fn" or target not in WITHOUT_FLOAT8]
    cases = cases[list(TARGETS).index(target) % one_in :: one_in]  # others for each GPU
    results = list(gpu_compile.compile_cases(target, cases))
    found = [f"{case}: {text}" for case, result in zip(cases, results) for text in complaints(case, result)]
    assert not found, "\n".join(found)
    assert [result.case for result in results] == [str(case) for case in cases]


DTYPES_OF_WHAT_IS_ADDED = """
import json, sys
import jax, jax.numpy as jnp
import mqa_jax
from benchmarks import gpu_compile

jax.config.update("jax_enable_x64", True)
for bias, of_heads in json.loads(sys.argv[2]):
    array = jax.ShapeDtypeStruct((1, 20, 2, 64), jnp.bfloat16)
    added = dict(bias=jax.ShapeDtypeStruct((1, 2, 20, 20), bias))
    added |= dict.fromkeys(("alibi_slopes", "sinks"), jax.ShapeDtypeStruct((2,), of_heads))
    attend = lambda x, added: mqa_jax.dot_product_attention(x, x, x, **added, implementation="triton")
    gradient = jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), argnums=(0, 1))
    gpu_compile.compile_program(sys.argv[1], gradient, (array, added))
    print('found: ' + json.dumps({}), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing()))
@pytest.mark.parametrize("target", FULLY)
def test_whatever_dtype_is_taken_compiles(target):
    """Those that are refused would end the compiler's process for some GPU (`test_triton_limits.py`)."""
    of_heads = ("float8_e4m3fn", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn")  # for each bias another one
    orders = [(jnp.dtype(bias).name, other) for bias, other in zip(triton.BIAS_DTYPES, of_heads)]
    assert [found for _, found in gpu_compile.results_of(DTYPES_OF_WHAT_IS_ADDED, target, orders)] == [{}] * len(orders)
