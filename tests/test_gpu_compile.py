"""What the compilers for NVIDIA GPUs make of our kernels, and that what they say is understood."""

import json
from dataclasses import asdict, replace
from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks import gpu_compile
from benchmarks.gpu_compile import (
    CASES,
    TARGETS,
    TF32,
    Case,
    Kernel,
    Launch,
    Result,
    compiler,
    kernels,
    launches,
    read_kernel,
)
from benchmarks.gpu_compile.__main__ import main
from benchmarks.model_shapes import MODEL_SHAPES, MULTI_QUERY, shape_of
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
    or (case.direction == "backward" and case.shape.name in DIFFERENT and case.dtype == "bfloat16")
    or (case.shape.name == "SmolLM2-135M" and (case.direction == "backward" or case.dtype == "bfloat16"))
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
    case for case in COMPILED if case.direction == "backward" and case.shape.name in ("Llama-3-8B", "Gemma-2B")
] + [MANY_KEYS, *DECODED[-2:]]
WITHOUT_FLOAT8 = ("a100",)
FULL_FLOAT32 = ("a100",)  # unrolled multiplications take long to compile
KERNELS = {
    "forward": ("mqa_forward",),
    "backward": ("mqa_forward", "mqa_dq", "mqa_dkv"),
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
        multiplies = case.dtype != "float32" and kernel.name.startswith(KERNELS["backward"])
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
def test_kernels_compile_well_for(target):
    """One test for each GPU, since a compiler's process is started once for all programs."""
    cases = [*COMPILED, *DECODED, *MASKED] if target in FULLY else LARGEST
    cases = [case for case in cases if case.dtype != "float32" or target in FULL_FLOAT32] + IN_TF32 + OF_FUNCTIONS
    cases = [case for case in cases if case.key_dtype != "float8_e4m3fn" or target not in WITHOUT_FLOAT8]
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


# -- reading, on texts as XLA and ptxas write them ---------------------------------------------------------------------

THUNKS = """\
001: kCopy         [source       | next=002 (1)] kCopy
002: kWhile        [prev=001 (1) | next=004 (1)]
condition:
    003: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
004: kCustomKernel [prev=002 (1) | sink ] mqa_dq grid: [8, 1, 8] threads: [128, 2, 1]  shared_memory: 163840 bytes
"""
PTX = """\
.version 9.0
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry mqa_dq(
	.param .u64 .ptr .align 16 mqa_dq_param_0
)
.reqntid 256, 1, 1
{
	@%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, 0x10;
	cp.async.commit_group;
	@%p1 cp.async.ca.shared.global [ %r2 + 0 ], [ %rd2 + 0 ], 0x8, 0x8;
	cp.async.commit_group;
	cp.async.wait_group 1;
	@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd3, {%r4, %r5}], [%r6];
	cp.async.bulk.commit_group;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,%f2}, %rd4, %rd5, p, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1,%f2}, %rd6, %rd7, p, 1, 1, 0, 0;
	wgmma.commit_group.sync.aligned;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1, %f2 }, { %r1, %r2 }, { %r3 }, { %f1, %f2 };
	@%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r7 + 0 ], %rd8, %rd9, %r8, %p4;
	tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%r9];
}
"""
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mqa_dq' for 'sm_90a'
ptxas info    : Function properties for mqa_dq
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 228 registers, used 1 barriers
ptxas info    : Compile time = 249.719 ms
"""
SPILLING = """\
ptxas info    : 0 bytes gmem
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function \
'mqa_dq'
ptxas info    : Compiling entry function 'mqa_dq' for 'sm_90a'
ptxas info    : Function properties for mqa_dq
    40 bytes stack frame, 24 bytes spill stores, 48 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 40 bytes cumulative stack size, 1024 bytes smem
"""
GOOD = Kernel(
    name="mqa_dq",
    programs=64,
    threads=256,
    registers=228,
    spills=0,
    shared_memory=163840,
    wgmma=2,
    tcgen05=1,
    mma_sync=1,
    serialized=False,
    async_copies=3,
)
LAUNCH = Launch(programs=64, threads=256, shared_memory=163840)
BACKWARD = Case(MODEL_SHAPES[0], "backward")
RESULT = Result("h100", str(BACKWARD), 1 << 20, tuple(replace(GOOD, name=name) for name in KERNELS["backward"]))


def test_kernel_is_read():
    launched = launches(THUNKS)
    assert launched == {"loop_compare_fusion": (1, 1, 0), "mqa_dq": (64, 256, 163840)}
    assert read_kernel("mqa_dq", launched["mqa_dq"], PTX, REPORT) == GOOD


def test_spills_static_memory_and_serialization_are_read():
    kernel = read_kernel("mqa_dq", LAUNCH, PTX, SPILLING)
    assert kernel == replace(GOOD, registers=255, spills=72, shared_memory=164864, serialized=True)


@pytest.mark.parametrize("report", ["", REPORT.replace("registers", "Register"), REPORT.replace("spill", "Spill")])
def test_report_in_other_words_is_refused(report):
    with pytest.raises(ValueError, match="reports neither spills nor registers of mqa_dq"):
        read_kernel("mqa_dq", LAUNCH, PTX, report)


def test_good_kernels_bring_no_complaint():
    assert complaints(BACKWARD, RESULT) == []


@pytest.mark.parametrize(
    ("target", "broken", "complaint"),
    [
        ("a100", dict(spills=4), "mqa_dq spills 4 bytes"),
        ("l40s", dict(shared_memory=101377), "mqa_dq takes 101377 bytes of shared memory; there are 101376"),
        ("h100", dict(wgmma=0), "mqa_dq has no wgmma"),
        ("h100", dict(serialized=True), "mqa_dq waits for each wgmma before the next"),
        ("b200", dict(tcgen05=0), "mqa_dq has no tcgen05"),
        ("h100", dict(name="dq"), "there is no kernel mqa_dq"),
    ],
)
def test_broken_kernel_brings_a_complaint(target, broken, complaint):
    kernels = tuple(replace(kernel, shared_memory=0) for kernel in RESULT.kernels)
    kernels = tuple(replace(kernel, **broken) if kernel.name == "mqa_dq" else kernel for kernel in kernels)
    assert complaints(BACKWARD, replace(RESULT, target=target, kernels=kernels)) == [complaint]


def test_temporaries_and_errors_bring_a_complaint():
    long = Case(MULTI_QUERY, "backward", queries=32768, keys=32768)
    assert complaints(long, replace(RESULT, temporaries=340 << 20)) == []
    assert complaints(long, replace(RESULT, temporaries=(340 << 20) + 1)) == ["356515841 bytes of temporaries"]
    assert complaints(BACKWARD, Result("h100", str(BACKWARD), error="ValueError: no")) == ["ValueError: no"]


STEP = replace(GOOD, name="mqa_decode", programs=256, threads=128, registers=168, shared_memory=77824)
PARTIALS = 256 * 32 * 129 * 4  # splits, heads, features and a log-sum-exp, float32
DECODING = Result("h100", str(MANY_KEYS), PARTIALS + ROUNDING, (STEP, replace(STEP, name="mqa_merge", async_copies=0)))


def test_good_decoding_brings_no_complaint():
    for target in TARGETS:
        assert complaints(MANY_KEYS, replace(DECODING, target=target)) == []


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (dict(spills=4), "mqa_decode spills 4 bytes"),
        (dict(async_copies=0), "mqa_decode computes nothing while it waits for keys"),
        (dict(programs=131), "mqa_decode has 131 programs; there are 132 multiprocessors"),
        (dict(name="mqa_forward"), "there is no kernel mqa_decode"),
    ],
)
def test_broken_decoding_brings_a_complaint(broken, complaint):
    kernels = replace(STEP, **broken), DECODING.kernels[1]
    assert complaints(MANY_KEYS, replace(DECODING, kernels=kernels)) == [complaint]


def test_a_copy_of_the_cache_brings_a_complaint():
    """Even one of the smallest cache, and of a shape without splits."""
    for case in (MANY_KEYS, DECODED[2], replace(MANY_KEYS, keys=2048)):
        keys = case.arguments()["key"]
        result = replace(DECODING, temporaries=keys.size * keys.dtype.itemsize)
        (complaint,) = complaints(case, result)
        assert "bytes of temporaries; " in complaint


def test_how_many_blocks_a_multiprocessor_holds():
    assert [target.resident(STEP) for target in TARGETS.values()] == [2, 2, 1, 2]
    assert [target.resident(replace(STEP, shared_memory=0)) for target in TARGETS.values()] == [3] * 4


# -- around the compilers ---------------------------------------------------------------------------------------------


def test_compiler_that_dies_costs_one_case(monkeypatch):
    worker = (
        "import json, os, sys\n"
        "for case in json.loads(sys.argv[2]):\n"
        "    if case['dtype'] == 'float16':\n"
        "        os.write(2, b'LLVM ERROR: out of luck in /some/place/file.cc\\n')\n"
        "        os._exit(3)\n"
        "    print('found: ' + json.dumps(dict(target=sys.argv[1], case=case['dtype'], kernels=[])), flush=True)\n"
    )
    monkeypatch.setattr(compiler, "WORKER", worker)
    cases = [replace(BACKWARD, dtype=dtype) for dtype in ("bfloat16", "float16", "float32")]
    error = "the compiler ended with status 3: LLVM ERROR: out of luck in file.cc"
    expected = [Result("h100", "bfloat16"), Result("h100", str(cases[1]), error=error), Result("h100", "float32")]
    assert list(gpu_compile.compile_cases("h100", cases)) == expected


def test_command_prints_and_writes_every_kernel(tmp_path, monkeypatch, capsys):
    broken = Result("h100", "broken", error="ValueError: no")
    monkeypatch.setattr(kernels, "missing", lambda: None)
    monkeypatch.setattr(kernels, "ptxas_version", lambda: "13.0.0")
    monkeypatch.setattr(compiler, "compile_cases", lambda target, cases: [RESULT, broken])
    file = tmp_path / "compiled.json"
    written = main(["--targets", "h100", "--only", "Llama-3-8B bfloat16", "--out", str(file)])
    assert set(written) == {"command", "date", "versions", "rows"}
    assert written["command"] == "python -m benchmarks.gpu_compile --targets h100 --only 'Llama-3-8B bfloat16'"
    assert written["versions"]["ptxas"] == "13.0.0"
    assert json.loads(file.read_text()) == json.loads(json.dumps(written))
    assert written["rows"] == [asdict(RESULT), asdict(broken)]
    title, *lines, last = capsys.readouterr().out.splitlines()
    assert title.split()[:4] == ["target", "case", "kernel", "programs"]
    assert [line.split()[-12] for line in lines] == list(KERNELS["backward"])
    assert {len(line) for line in lines} == {len(title)}
    assert last == "h100  broken: ValueError: no"


def test_absent_compiler_is_reported_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("MQA_JAX_CUDA_PLUGIN", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="JAX's compiler for CUDA is not installed: `make cuda-compiler`"):
        main([])
    (tmp_path / "jax_plugins/xla_cuda13").mkdir(parents=True)
    assert gpu_compile.missing() == "ptxas is not installed: `make cuda-compiler`"
    (tmp_path / "nvidia/cu13/bin").mkdir(parents=True)
    (tmp_path / "nvidia/cu13/bin/ptxas").touch()
    assert gpu_compile.missing() is None
    with pytest.raises(SystemExit, match="no case has any of"):
        main(["--only", "no such model"])


def test_names_tell_cases_apart():
    assert len({str(case) for case in CASES}) == len(CASES)
    assert {*COMPILED, *DECODED} <= {*CASES}
