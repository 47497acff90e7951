"""What becomes of peers in the benchmarks: the same problem, the same numbers, and a row whatever happens."""

import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from tiny import SPEED, TINY, never, rows_of

from benchmarks import (
    gpu_compile,
    judge,
    table,
)
from benchmarks.__main__ import main
from benchmarks.candidate import Candidate
from benchmarks.cases import Case, Line, Peers
from benchmarks.gpu_compile import memory
from benchmarks.measure import measure
from benchmarks.peers import jax_attention, torch_attention
from benchmarks.problems import FORWARD, Problem
from benchmarks.timing import QUICK, Settings

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


# -- peers -------------------------------------------------------------------------------------------------------------
HARD = Problem(2, 12, 12, 4, 2, 8, is_causal=True, window=5, alibi=True, documents=2)
CHUNK = Problem(2, 3, 12, 4, 2, 8, is_causal=True, window=5)


@pytest.mark.torch
@pytest.mark.parametrize("problem", [HARD, CHUNK], ids=str)
@pytest.mark.parametrize("same_layout", [False, True])
def test_torch_computes_the_same(problem, same_layout):
    candidate = torch_attention.sdpa(problem, same_layout=same_layout)
    np.testing.assert_allclose(candidate.outputs()[0], judge.exact(problem)[0], atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("problem", [HARD, CHUNK], ids=str)
def test_flex_attention_is_asked_for_the_same(problem, monkeypatch):
    """Uncompiled, which takes PyTorch no ten seconds, and warns."""
    import torch

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = torch_attention.flex(problem).outputs()
    np.testing.assert_allclose(outputs[0], judge.exact(problem)[0], atol=1e-5)
    backward = replace(problem, gradients=True)
    _, row = measure(
        Case("tiny", "ms", backward, {"ours": SPEED["ours"], "torch flex": torch_attention.flex}, judge.exact), QUICK
    )
    assert (row.status, row.message) == ("not applicable", "it has no backward pass on CPUs")


@pytest.mark.parametrize("problem", [HARD, CHUNK], ids=str)
@pytest.mark.parametrize("peer", ["jax.nn", "flax.linen"])
def test_others_in_jax_are_asked_for_the_same(peer, problem):
    problem = replace(problem, gradients=True)
    for array, right in zip(jax_attention.timed(peer, problem).outputs(), judge.exact(problem), strict=True):
        np.testing.assert_allclose(array, right, atol=1e-4)


# -- what becomes of peers ---------------------------------------------------------------------------------------------


def test_wrong_peer_is_marked_and_not_measured():
    zeros = Candidate(lambda: [np.zeros((1, 4, 2, 4), np.float32)], never)
    nan = Candidate(lambda: [np.full((1, 4, 2, 4), np.nan, np.float32)], never)
    _, *rows = rows_of({"ours": SPEED["ours"], "zeros": lambda problem: zeros, "nan": lambda problem: nan})
    for row in rows:
        assert (row.status, row.cost, row.ratio) == ("wrong", None, None)
        assert "from the reference" in table.cost(vars(row))
    json.dumps([vars(row) for row in rows], allow_nan=False)


def test_peers_are_compared_with_the_reference_and_not_with_us():
    zeros = Candidate(lambda: [np.zeros((1, 4, 2, 4), np.float32)], never)
    wrong, right = rows_of({"ours": lambda problem: zeros, "jax.nn": SPEED["jax.nn"]})
    assert wrong.status == "wrong"
    assert (right.status, right.ratio) == ("measured", None)


@pytest.mark.parametrize("when", ["built", "checked", "measured"])
def test_raising_peer_appears_with_its_message(when):
    def fail(*arguments):
        raise RuntimeError("out of luck in /some/place/file.gguf\nand more")

    right = SPEED["ours"](TINY).outputs
    builds = {
        "built": fail,
        "checked": lambda problem: Candidate(fail, never),
        "measured": lambda problem: Candidate(right, fail),
    }
    ours, row = rows_of({"ours": SPEED["ours"], "unlucky": builds[when]})
    assert (row.status, row.message) == ("raised", "RuntimeError: out of luck in file.gguf")
    assert table.cost(vars(row)) == "raised: RuntimeError: out of luck in file.gguf"
    assert ours.status == "measured"


def test_absent_peer_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    ours, row = rows_of({"ours": SPEED["ours"], "torch": SPEED["torch"]})
    assert (ours.status, row.status) == ("measured", "absent")
    assert "torch" in row.message


def test_a_peer_that_takes_long_takes_fewer_turns(monkeypatch):
    turns = []
    zeros = lambda: [np.zeros((1, 4, 2, 4), np.float32)]

    def costing(name: str, seconds: float) -> Candidate:
        return Candidate(zeros, lambda least: (turns.append(name), seconds)[1])  # type: ignore[func-returns-value]

    slow, quick = costing("slow", 1.0), costing("quick", 0.5)
    clock = iter(range(1000))
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: float(next(clock)))
    peers: Peers = {"ours": lambda problem: quick, "slow": lambda problem: slow}
    case = Case("tiny", "ms", TINY, peers, lambda problem: zeros())
    ours, row = measure(case, Settings(turns=9, peer_seconds=2))
    assert turns == ["quick", "slow"] * 3  # each turn takes a second here
    assert (ours.cost, row.cost, row.ratio) == (0.5, 1.0, 2.0)


def test_results_are_written_only_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.__main__.memory.main", lambda quick: {"missing": "asked for nothing", "rows": []})
    case = lambda line, problem, device, quick: Case(line.name, "ms", problem, {"ours": SPEED["ours"]}, judge.exact)
    line = Line("tiny", {"cpu": replace(TINY, head_dim=8)}, case, (FORWARD,))
    monkeypatch.setattr("benchmarks.__main__.lines_of", lambda device: {"tiny": line})
    monkeypatch.setattr("benchmarks.ceilings.measure_ceilings", lambda settings, quick: {"error": "not here"})
    main(["--quick"])
    main(["--only", "tiny", "--repeats", "1"])
    assert not list(tmp_path.iterdir())
    main(["--repeats", "1"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


# -- memory on GPUs without one ----------------------------------------------------------------------------------------


def test_memory_on_gpus_says_what_failed_and_who_died(monkeypatch):
    def results_of(worker, target, orders):
        for case, peer in orders:
            if peer == "jax.nn":
                yield (case, peer), "the compiler ended with status 3: out of luck"
            else:
                row = memory.row_of(target, case, peer, status="measured", temporaries=3 << 20)
                yield (case, peer), vars(row)

    monkeypatch.setattr(gpu_compile, "missing", lambda: None)
    monkeypatch.setattr(gpu_compile, "results_of", results_of)
    found = memory.main()
    assert len(found["rows"]) == len(memory.GPUS) * len(memory.pairs())
    assert {row["status"] for row in found["rows"] if row["peer"] == "jax.nn"} == {"raised"}
    text = table.aligned_memory(found)
    assert len(text.splitlines()) == 1 + len(memory.pairs())
    assert "3.00 MiB" in text
    assert "raised: the compiler ended with status 3" in text


def test_absent_compiler_for_gpus_is_reported_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("MQA_JAX_CUDA_PLUGIN", str(tmp_path))
    found = memory.main()
    assert found["rows"] == []
    assert "`make cuda-compiler`" in table.aligned_memory(found)


@pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing()))
def test_memory_of_ours_is_linear_and_that_of_jax_nn_is_not(monkeypatch):
    wanted = [("multi-query", "ours"), ("multi-query", "jax.nn")]
    monkeypatch.setattr(memory, "pairs", lambda: wanted)
    ours, others = memory.compile_for("h100")
    assert (ours.status, others.status) == ("measured", "measured"), (ours, others)
    assert (ours.temporaries or 0) < 512 << 20 < 10 << 30 < (others.temporaries or 0)
