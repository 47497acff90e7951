"""The benchmarks for GPUs run, judge what they time, hide nothing. No speed is asserted."""

import functools
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import gpu, judge, processes, table, tune
from benchmarks.__main__ import main
from benchmarks.candidate import Candidate, NotApplicable
from benchmarks.cases import Case, Peers, lines_of
from benchmarks.measure import Row, measure
from benchmarks.peers import jax_attention, torch_attention
from benchmarks.problems import BACKWARD, BOTH, FORWARD, Problem
from benchmarks.timing import QUICK

pytestmark = pytest.mark.slow
TINY = Problem(batch=1, queries=24, keys=24, heads=4, kv_heads=2, head_dim=8, is_causal=True, dtype="bfloat16")


def never(least: float) -> float:
    raise AssertionError("timed although it should not be")


# -- python -m benchmarks --gpu ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a quick run of one line writes."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    printed = main(["--gpu", "--quick", "--only", "Phi-2", "--repeats", "1", "--out", str(file)])
    written = json.loads(file.read_text())
    assert written == printed
    return written


def peers_of(name: str) -> list[str]:
    return list(lines_of("gpu")[name].cases("gpu", quick=True)[0].peers)


def test_every_peer_has_a_row_for_every_direction(results):
    expected = [(direction, peer) for direction in (FORWARD, BACKWARD, BOTH) for peer in peers_of("Phi-2")]
    assert [(row["direction"], row["peer"]) for row in results["rows"]] == expected
    for row in results["rows"]:
        if row["direction"] != BACKWARD and row["peer"] in ("ours", "ours, xla", "jax.nn", "pallas mha"):
            assert row["status"] == "measured", row
            assert row["flops"] > 0
            assert (row["ratio"] is None) == (row["peer"] == "ours")


def test_results_say_how_they_were_measured(results):
    assert results["command"] == "python -m benchmarks --gpu --only Phi-2 --repeats 1 --quick"
    assert results["tests"] == "not run: not asked for"
    assert set(results["ceilings"]["matmul"]) == {"bfloat16", "float16", "float32"}
    assert results["machine"].keys() >= {"device", "driver"}
    whole = table.whole(results)
    assert table.describe_ceilings(results["ceilings"]) in whole
    for row in results["rows"]:
        if row["status"] != "not applicable":
            assert f"\n| {row['case']} | {row['problem']} | {row['direction']} | {row['peer']} | " in whole


def test_flops():
    problem = Problem(batch=2, queries=64, keys=64, heads=3, kv_heads=1, head_dim=8)
    forward = 4 * 2 * 3 * 64 * 64 * 8
    assert problem.flops == forward
    assert replace(problem, is_causal=True).flops == forward / 2
    assert replace(problem, gradients=True).flops == 3.5 * forward
    assert replace(problem, is_causal=True, documents=4).flops == forward / 8
    assert replace(problem, is_causal=True, window=64).flops == forward / 2
    assert replace(problem, is_causal=True, window=16).flops == forward * (64 * 16 - 16 * 16 / 2) / 64**2
    assert replace(problem, queries=16, is_causal=True).flops == forward / 4 - forward / 32
    assert replace(problem, queries=16, is_causal=True, window=32).flops == forward / 8
    assert gpu.Added(replace(problem, gradients=True), problem).flops == 2.5 * forward


@pytest.fixture(scope="module")
def steps():
    """What a process of the command finds for some steps of decoding."""
    names = ["decode-one", "decode-window", "decode-int8"]
    return dict(gpu.work(names, True, QUICK, time.monotonic() + gpu.MAX_CASE_SECONDS))


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("decode-one", {"jax.nn", "pallas decode"}),
        ("decode-window", {"jax.nn", "pallas decode"}),
        ("decode-int8", set()),
    ],
)
def test_steps_of_decoding_are_measured_by_what_they_read(name, others, steps):
    line = lines_of("gpu")[name]
    problem = line.problem("gpu", quick=True)
    rows = gpu.rated(steps[name], line, True, {"copy": 1e12})
    assert [(row["direction"], row["peer"]) for row in rows] == [(FORWARD, peer) for peer in peers_of(name)]
    measured = [row for row in rows if row["status"] == "measured"]
    assert {row["peer"] for row in measured} >= {"ours", "ours, xla", *others}, rows
    for row in measured:
        assert row["bandwidth"] == problem.bytes / row["cost"] == pytest.approx(1e12 * row["copy_share"])
    if not others:
        assert {row["peer"]: row["message"] for row in rows}["pallas decode"] == "it has no key_dtype"


def test_bytes_of_a_cache():
    problem = Problem(batch=2, queries=1, keys=64, heads=6, kv_heads=3, head_dim=8, dtype="bfloat16")
    query = 2 * 6 * 8 * 2
    assert problem.cache_bytes == 2 * 2 * 64 * 3 * 8 * 2
    assert problem.bytes == problem.cache_bytes + 2 * query
    assert replace(problem, gradients=True).bytes == 3 * problem.cache_bytes + 6 * query
    assert replace(problem, window=16).cache_bytes == problem.cache_bytes / 4
    assert replace(problem, key_dtype="int8").cache_bytes == problem.cache_bytes / 2 + 2 * 2 * 64 * 3 * 4


def test_the_numbers_of_a_long_cache_repeat(monkeypatch):
    """In JAX and in PyTorch the same, with scales and without."""
    monkeypatch.setattr(jax_attention, "MAX_CACHE", 8)
    problem = Problem(batch=3, queries=1, keys=32, heads=4, kv_heads=2, head_dim=8)
    arrays = jax_attention.on_device(problem)
    assert [x.shape for x in arrays] == problem.shapes()
    np.testing.assert_array_equal(arrays[1][0, :8], arrays[1][2, 24:])
    (key, scale), (value, _) = jax_attention.on_device(replace(problem, key_dtype="int8"))[1:3]
    assert (key.shape, scale.shape, value.shape) == ((3, 32, 2, 8), (3, 32, 2), (3, 32, 2, 8))
    restored = jax_attention.plain_arrays(replace(problem, key_dtype="int8"), "float32")[1]
    np.testing.assert_allclose(restored, arrays[1], atol=0.02)
    pytest.importorskip("torch")
    for tensor, array in zip(torch_attention.tensors_of(problem, "cpu"), arrays):
        np.testing.assert_array_equal(tensor.transpose(1, 2), array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_wrong_numbers_are_not_timed(dtype):
    """One head, or one gradient, or everything by a little more than the rule allows."""
    problem = replace(TINY, dtype=dtype, gradients=True, window=9, alibi=True, documents=2)
    right, allowed = judge.exact(problem), judge.allowed("theirs", problem)
    assert len(right) == len(allowed) == 4
    off = [
        [right[0] * np.array([1, 1, 1, 0])[:, None], *right[1:]],
        [*right[:3], -right[3]],
        [x + 1.01 * most for x, most in zip(right, allowed)],
    ]
    giving = lambda arrays: lambda problem: Candidate(lambda: arrays, never)
    peers: Peers = {"ours, xla": functools.partial(jax_attention.timed, "ours, xla")}
    peers = {**peers, **{f"wrong {number}": giving(arrays) for number, arrays in enumerate(off)}}
    case = Case("tiny", "ms", problem, peers, judge.exact, allowed=judge.allowed)
    assert [row.status for row in measure(case, QUICK)] == ["measured", "wrong", "wrong", "wrong"]


def test_what_a_peer_does_not_do_is_said():
    with pytest.raises(NotApplicable, match="it has no window"):
        jax_attention.timed("pallas mha", replace(TINY, window=4))
    with pytest.raises(NotApplicable, match="one array of all scores would be 64 GiB"):
        jax_attention.timed("jax.nn", replace(TINY, queries=1 << 16, keys=1 << 16))


def test_the_backward_pass_is_a_difference():
    row = functools.partial(
        Row, "tiny", "problem", 1, 8, "ms", direction=FORWARD, status="measured", compile_seconds=1.0
    )
    forward = [row("ours", cost=1.0), row("theirs", cost=2.0), row("noisy", cost=2.0), row("broken", cost=1.0)]
    failed = replace(forward[3], status="raised", cost=None, message="out of luck")
    both = [row("ours", cost=3.0), row("theirs", cost=6.0), row("noisy", cost=1.0), failed]
    found = gpu.differences(forward, both)
    assert [(x.status, x.cost, x.ratio) for x in found] == [
        ("measured", 2.0, None),
        ("measured", 4.0, 2.0),
        ("measured", None, None),
        ("raised", None, None),
    ]
    assert found[3].message == "out of luck"
    assert {(x.direction, x.compile_seconds) for x in found} == {(BACKWARD, None)}


def test_without_a_gpu_the_command_says_so():
    for command in (lambda: main(["--gpu"]), lambda: tune.main([])):
        with pytest.raises(SystemExit, match="no GPU here that JAX can use"):
            command()
    with pytest.raises(SystemExit):
        main(["--gpu", "--only", "demo"])  # a case of the other benchmarks


# -- processes that end ------------------------------------------------------------------------------------------------
NAMES = ["ceilings", "Llama-3-8B", "decode-mqa"]


def work(monkeypatch, program: str, seconds: float = 60.0) -> dict:
    """What is found by processes that run this program instead."""
    prelude = f"import json, os, sys, time; names = json.loads(sys.argv[2]); mark = {processes.MARK!r}; "
    monkeypatch.setattr(gpu, "WORKER", prelude + program)
    return dict(gpu.work(NAMES, True, QUICK, time.monotonic() + seconds))


def messages(found: dict) -> list[str]:
    return [found["ceilings"]["error"], *({row["message"] for row in found[name]}.pop() for name in NAMES[1:])]


def test_a_process_that_ends_is_the_result_of_its_case_alone(monkeypatch):
    found = work(monkeypatch, "sys.exit('out of luck in /some/place/file.cu')")
    assert messages(found) == ["its process ended with status 1: out of luck in file.cu"] * 3
    rows = gpu.rated(found["Llama-3-8B"], lines_of("gpu")["Llama-3-8B"], True, found["ceilings"])
    assert {(row["status"], row["cost"], row["flops"]) for row in rows} == {("raised", None, None)}
    assert "out of luck in file.cu" in table.aligned(rows)


def test_a_process_that_has_lost_its_gpu_is_replaced(monkeypatch):
    found = work(
        monkeypatch, f"print('noise'); print(mark + json.dumps([names[0]]), flush=True); os._exit({processes.WORN_OUT})"
    )
    assert found == {name: [name] for name in NAMES}


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(gpu, "MAX_CASE_SECONDS", 0.2)
    assert messages(work(monkeypatch, "time.sleep(60)")) == ["its process ended with status -9: "] * 3


def test_what_there_is_no_time_for_is_said(monkeypatch):
    assert messages(work(monkeypatch, "time.sleep(60)", seconds=0.2)) == ["time is up"] * 3


ABSENT = '<testcase name="tests.test_x"><error>E ModuleNotFoundError: No module named gguf</error></testcase>'


@pytest.mark.parametrize(
    ("status", "cases", "expected"),
    [
        (0, '<testcase name="a"/><testcase name="b"><skipped/></testcase>', "passed: 1 passed, 0 failed, 1 skipped"),
        (0, '<testcase name="a"><skipped/></testcase>', "failed: 0 passed, 0 failed, 1 skipped"),
        (5, "", "failed: 0 passed, 0 failed, 0 skipped"),
        (1, '<testcase name="a"/><testcase name="b"><failure/></testcase>', "failed: 1 passed, 1 failed, 0 skipped"),
        (1, f'<testcase name="a"/>{ABSENT}', "passed: 1 passed, 0 failed, 0 skipped"),
        (1, ABSENT, "failed: 0 passed, 0 failed, 0 skipped"),
        (2, f'<testcase name="a"/>{ABSENT}', "failed: 1 passed, 0 failed, 0 skipped"),
    ],
)
def test_no_test_on_the_gpu_is_a_failure_and_a_file_for_want_of_a_package_is_none(status, cases, expected, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    found = gpu.verdict(status, report)
    assert found.startswith(f"{expected} on the GPU")
    assert ("for want of packages: tests.test_x" in found) == (ABSENT in cases)
