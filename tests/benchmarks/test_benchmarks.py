"""The benchmarks run, check what they measure, and hide nothing. No speed is asserted."""

import json
from dataclasses import replace

import pytest

from benchmarks import (
    cases,
    gpu_compile,
    plots,
    table,
)
from benchmarks.__main__ import main
from benchmarks.cases import lines_of
from benchmarks.compare import compare
from benchmarks.compare import main as compare_files
from benchmarks.gpu_compile import memory
from benchmarks.measure import measure
from benchmarks.peers import jax_attention, text
from benchmarks.problems import BOTH
from benchmarks.timing import QUICK

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
MEASURED = (
    "length-512",
    "memory-8192",
    "Mistral-7B-prefill",
    "Mistral-7B-decode",
    "layer",
    "layer-decode",
    "train-step",
)


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
