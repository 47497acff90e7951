"""What is read from the texts of compilers for NVIDIA GPUs, and what becomes of a compiler that fails."""

import json
from dataclasses import asdict, replace

import pytest
from test_compiled_kernels import COMPILED, DECODED, KERNELS, MANY_KEYS, ROUNDING, complaints

from benchmarks import gpu_compile
from benchmarks.gpu_compile import (
    CASES,
    TARGETS,
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
from benchmarks.model_shapes import MODEL_SHAPES, MULTI_QUERY

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


# -- around the compilers ----------------------------------------------------------------------------------------------


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
