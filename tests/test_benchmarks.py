"""The benchmarks run, check what they measure, and hide nothing. No speed is asserted."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import demo, environment, table
from benchmarks.__main__ import main
from benchmarks.cases import CASES, SPEED, Case, Peers
from benchmarks.measure import Row, measure
from benchmarks.peers import Attention, Candidate
from benchmarks.timing import QUICK

pytestmark = pytest.mark.slow

TINY = Attention(batch=1, queries=4, keys=4, heads=2, kv_heads=1, head_dim=4)
ATTENTION_CASES = [case for case in CASES if isinstance(case.problem, Attention)]
HAS_TORCH = importlib.util.find_spec("torch") is not None


def rows_of(peers: Peers) -> list[Row]:
    return measure(Case("tiny", "ms", TINY, peers), QUICK)


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
    """What a quick run writes; the demo's model takes too long to load and compile."""
    file = tmp_path_factory.mktemp("benchmarks") / "cpu.json"
    names = [case.name for case in ATTENTION_CASES]
    printed = main(["--quick", "--repeats", "1", "--only", *names, "--out", str(file)])
    written = json.loads(file.read_text())
    assert written == printed
    return written


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_every_peer_of_every_case_has_a_row(case, results):
    rows = {row["peer"]: row for row in results["rows"] if row["case"] == case.name}
    assert list(rows) == list(case.peers)
    for peer, row in rows.items():
        if peer.startswith("torch") and not HAS_TORCH:
            assert row["status"] == "absent"
            continue
        assert row["status"] == "measured", row
        assert row["cost"] > 0
        assert (row["ratio"] is None) == (peer == "ours")


def test_results_say_how_they_were_measured(results):
    names = " ".join(case.name for case in ATTENTION_CASES)
    assert results["command"] == f"python -m benchmarks --only {names} --repeats 1 --quick"
    assert {"python", "mqa_jax", "jax", "jaxlib", "flax", "numpy", "torch", "transformers"} == set(results["versions"])
    assert set(results["machine"]) == {"cpu", "cores", "load", "device"}
    assert results["machine"]["cores"] > 0


def test_table_has_a_line_for_every_row(results):
    text, markdown = table.aligned(results["rows"]), table.markdown(results)
    assert len(text.splitlines()) == 1 + len(results["rows"])
    for row in results["rows"]:
        assert f"\n| {row['case']} | {row['problem']} | {row['peer']} | " in markdown
    assert results["command"] in markdown


def test_the_table_in_the_readme_is_that_of_the_results():
    root = Path(table.__file__).parents[1]
    results = json.loads((root / "benchmarks/results/cpu.json").read_text())
    assert table.markdown(results) in (root / "README.md").read_text()


def test_wrong_peer_is_marked_and_not_measured():
    zeros = Candidate(lambda: [np.zeros((1, 4, 2, 4), np.float32)], never)
    nan = Candidate(lambda: [np.full((1, 4, 2, 4), np.nan, np.float32)], never)
    _, *rows = rows_of({"ours": SPEED["ours"], "zeros": lambda problem: zeros, "nan": lambda problem: nan})
    for row in rows:
        assert (row.status, row.cost, row.ratio) == ("wrong", None, None)
        assert "from the reference" in table.cells(vars(row))[3]
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
    assert table.cells(vars(row))[3] == "raised: RuntimeError: out of luck in file.gguf"
    assert ours.status == "measured"


def test_absent_peer_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    ours, row = rows_of({"ours": SPEED["ours"], "torch": SPEED["torch"]})
    assert (ours.status, row.status) == ("measured", "absent")
    assert "torch" in row.message


def test_results_are_written_only_where_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.__main__.CASES", [Case("tiny", "ms", TINY, {"ours": SPEED["ours"]})])
    main(["--quick"])
    main(["--only", "tiny", "--repeats", "1"])
    assert not list(tmp_path.iterdir())
    main(["--repeats", "1"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


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
    case = next(case for case in CASES if case.name == "demo")
    case = replace(case, problem=demo.Text("a", new_tokens=4, model=tmp_path))
    rows = measure(case, QUICK)
    assert [(row.peer, row.status, row.error) for row in rows] == [(peer, "measured", 0) for peer in case.peers], rows
