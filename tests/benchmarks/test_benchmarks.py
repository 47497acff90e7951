"""The benchmarks run, check what they measure, and hide nothing. No speed is asserted."""

import importlib.util
import json
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import (
    cases,
    environment,
    gpu_compile,
    judge,
    plots,
    table,
)
from benchmarks.__main__ import main
from benchmarks.candidate import Candidate
from benchmarks.cases import Case, Line, Peers, lines_of
from benchmarks.compare import compare
from benchmarks.compare import main as compare_files
from benchmarks.gpu_compile import memory
from benchmarks.measure import Row, measure
from benchmarks.peers import jax_attention, text, torch_attention
from benchmarks.problems import BOTH, FORWARD, Problem
from benchmarks.timing import QUICK, Settings

pytestmark = pytest.mark.slow

TINY = Problem(batch=1, queries=4, keys=4, heads=2, kv_heads=1, head_dim=4)
MEASURED = (
    "length-512",
    "memory-8192",
    "Mistral-7B-prefill",
    "Mistral-7B-decode",
    "layer",
    "layer-decode",
    "train-step",
)
HAS_TORCH = importlib.util.find_spec("torch") is not None
SPEED: Peers = {name: jax_attention.peers_for(TINY, "cpu")[name] for name in ("ours", "jax.nn")} | {
    "torch": torch_attention.sdpa
}


def rows_of(peers: Peers, settings: Settings = QUICK) -> list[Row]:
    return measure(Case("tiny", "ms", TINY, peers, judge.exact), settings)


def never(least: float) -> float:
    raise AssertionError("measured although it should not be")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Torch's threads wait for each other by spinning; tests that run side by side would wait long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "usable_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a quick run writes, of a line of each kind; the demo's model takes too long to load and compile."""
    file = tmp_path_factory.mktemp("benchmarks") / "cpu.json"
    printed = main(["--quick", "--repeats", "1", "--only", *MEASURED, "gpu-memory", "--out", str(file)])
    written = json.loads(file.read_text())
    assert written == printed
    return written


@pytest.mark.parametrize("name", MEASURED)
def test_every_peer_of_every_case_has_a_row(name, results):
    rows = {(row["direction"], row["peer"]): row for row in results["rows"] if row["case"] == name}
    expected = [
        (case.direction, peer) for case in lines_of("cpu")[name].cases("cpu", quick=True) for peer in case.peers
    ]
    assert list(rows) == expected
    for (_, peer), row in rows.items():
        if peer in jax_attention.ON_GPU:
            assert (row["status"], row["message"]) == ("not applicable", "it runs on GPUs only")
        elif row["status"] == "absent":
            assert peer.startswith(("torch", "tokamax"))
        else:
            assert row["status"] == "measured", row
            assert row["cost"] > 0
            assert (row["ratio"] is None) == (peer == "ours")


def test_rates_follow_from_what_a_problem_needs(results):
    ceilings, seen = results["ceilings"], 0
    for row in results["rows"]:
        if row["unit"] == "ms" and row["status"] == "measured":
            cases = {case.direction: case for case in lines_of("cpu")[row["case"]].cases("cpu", quick=True)}
            problem = cases[row["direction"]].problem
            assert row["flops"] == problem.flops / row["cost"]
            assert row["bandwidth"] == problem.bytes / row["cost"]
            assert row["matmul_share"] == row["flops"] / ceilings["matmul"]["float32"]
            assert row["copy_share"] == row["bandwidth"] / ceilings["copy"]
            seen += 1
        else:
            assert row["flops"] is row["bandwidth"] is row["matmul_share"] is row["copy_share"] is None
        if row["status"] == "measured" and not row["peer"].startswith("torch"):
            assert row["temporaries"] is not None
            assert row["compile_seconds"] > 0
    assert seen > 10


def test_results_say_how_they_were_measured(results):
    names = " ".join([*MEASURED, "gpu-memory"])
    assert results["command"] == f"python -m benchmarks --only {names} --repeats 1 --quick"
    assert {"jax", "jaxlib", "flax", "numpy", "torch", "transformers", "tokamax"} < set(results["versions"])
    assert set(results["machine"]) == {"cpu", "cores", "load", "device"}
    assert results["machine"]["cores"] > 0
    assert results["gpu_memory"] == {"missing": gpu_compile.missing() or "--quick", "rows": []}


def test_tables_hide_nothing(results):
    """All of it has a line for every row, or a note for what does not apply; the compact one a line for every case."""
    whole, compact = table.whole(results), table.compact(results)
    for row in results["rows"]:
        if row["status"] == "not applicable":
            assert f"- {row['peer']}: {row['message']} (" in whole
        else:
            assert f"\n| {row['case']} | {row['problem']} | {row['direction']} | {row['peer']} | " in whole
        assert f"\n| {row['case']} | {row['problem']} | {row['direction']} | " in compact
    assert results["command"] in whole
    for row in table.losses(results["rows"]):
        assert f"{row['case']} {row['direction']}".strip() + f" {table.figures(row['ratio'])}x" in table.where_we_lose(
            results
        )


@pytest.mark.parametrize("file", table.result_files(), ids=lambda file: file.stem)
def test_what_is_committed_agrees_with_the_results(file):
    results = json.loads(file.read_text())
    assert file.with_suffix(".md").read_text() == table.whole(results) + "\n"
    for name in plots.DRAWINGS:
        picture = plots.FOLDER / f"{file.stem}-{name}.png"
        if picture.exists() and file.stem == "cpu":
            assert f"plots/{picture.name}" in table.README.read_text()


def test_the_readme_of_the_results_shows_those_of_the_cpu_and_says_why_a_peer_is_faster():
    results = json.loads((table.RESULTS / "cpu.json").read_text())
    text = table.README.read_text()
    assert table.readme_with(results, text) == text
    _, reasons = text.split(table.END)
    for row in table.losses(results["rows"]):
        assert f"`{row['case']}`" in reasons, f"{table.README.name}: no reason for {row['case']} {row['peer']}"


def test_every_line_of_the_table_is_named_once_and_shrinks():
    for device in ("cpu", "gpu"):
        lines = [line for line in cases.LINES if device in line.problems]
        assert len(lines_of(device)) == len(lines)
        for line in lines:
            for case in line.cases(device, quick=True):
                assert next(iter(case.peers)) == "ours"
                assert case.checked is None or not case.allowed or case.problem == line.problem(device, quick=True)


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


# -- pictures and comparisons ------------------------------------------------------------------------------------------


def test_pictures_are_drawn_from_the_file_alone(results, tmp_path):
    rows = [*results["rows"]]
    for length in (1024, 2048):  # as many points as a line needs
        rows += [{**row, "case": f"length-{length}", "length": length} for row in rows if row["case"] == "length-512"]
    rows += [{**row, "case": "Llama-3-8B-decode-1"} for row in rows if row["case"] == "Mistral-7B-decode"]
    on_gpus = [vars(memory.row_of("h100", "multi-query", "ours", status="measured", temporaries=1 << 20))]
    file = tmp_path / "some.json"
    file.write_text(json.dumps({**results, "rows": rows, "gpu_memory": {"missing": None, "rows": on_gpus}}))
    pictures = plots.draw(file, tmp_path)
    assert [path.name for path in pictures] == [f"some-{name}.png" for name in plots.DRAWINGS]
    file.write_text(json.dumps({**results, "rows": [], "gpu_memory": {"missing": None, "rows": []}}))
    assert plots.draw(file, tmp_path) == []


def result_with(machine: str = "a", **costs: float | None) -> dict:
    """A row for each peer."""
    row = dict(case="x", problem="p", direction=BOTH, status="measured", message="")
    rows = [
        {**row, "peer": peer.replace("_", "."), "cost": cost, "ratio": None if peer == "ours" else cost and cost / 2}
        for peer, cost in costs.items()
    ]
    for found in rows:
        if found["cost"] is None:
            found |= {"status": "raised", "message": "RuntimeError: no"}
    described = {"cpu": machine, "cores": 2, "device": "cpu", "load": 0.0}
    return {"machine": described, "versions": {"jax": "1"}, "rows": rows}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (dict(ours=1.0), dict(ours=1.1), []),
        (dict(ours=1.0), dict(ours=1.2), [("regression", "ours", 1.2)]),
        (dict(ours=1.2), dict(ours=1.0), [("improvement", "ours", 1 / 1.2)]),
        (dict(ours=1.0), dict(ours=None), [("missing", "ours", None)]),
        (dict(ours=1.0), dict(), [("missing", "ours", None)]),
        (dict(ours=None), dict(ours=1.0), [("new", "ours", None)]),
        (
            dict(ours=1.0, torch=4.0),
            dict(ours=1.0, torch=1.0),
            [],
        ),  # a peer that became faster is no regression of ours
        (dict(ours=1.0, torch=4.0), dict(machine="b", ours=9.0, torch=2.0), [("regression", "torch", 2.0)]),
        (dict(ours=1.0, torch=4.0), dict(machine="b", ours=9.0, torch=8.0), [("improvement", "torch", 0.5)]),
    ],
)
def test_comparison_names_what_changed(old, new, expected):
    changes = compare(result_with(**old), result_with(**new), 1.15)
    assert [(change.kind, change.key[3], change.factor) for change in changes] == expected


def test_comparison_fails_for_regressions_and_warns_of_other_machines(tmp_path, capsys):
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    paths[0].write_text(json.dumps(result_with(ours=1.0)))
    paths[1].write_text(json.dumps(result_with(ours=None)))
    assert compare_files([str(path) for path in paths]) == 1
    assert "missing  x     p        forward+backward  ours  raised: RuntimeError: no" in capsys.readouterr().out
    paths[1].write_text(json.dumps({**result_with("b", ours=1.0), "versions": {"jax": "2"}}))
    assert compare_files([str(path) for path in paths]) == 0
    printed = capsys.readouterr().out
    assert "warning: machine cpu: a -> b\nwarning: versions jax: 1 -> 2" in printed
    with pytest.raises(SystemExit):
        compare_files([*map(str, paths), "--threshold", "0.9"])


# -- the demo ----------------------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_demo_writes_what_transformers_writes(tmp_path):
    import tokenizers
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = tokenizers.models.WordLevel({"a": 3}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    (case,) = lines_of("cpu")["demo"].cases("cpu")
    case = replace(case, problem=text.Text("a", new_tokens=4, model=tmp_path))
    rows = measure(case, QUICK)
    assert [(row.peer, row.status, row.error) for row in rows] == [(peer, "measured", 0) for peer in case.peers], rows
