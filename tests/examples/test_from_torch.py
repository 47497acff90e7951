"""examples/from_torch.py: on a small model, where nothing may change, and on SmolLM2."""

import dataclasses
from typing import Any

import numpy as np
import own_process
import pytest
import small_model

import mqa_jax

pytestmark = pytest.mark.torch
LENGTH = 61  # tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model.write(tmp_path_factory.mktemp("model"))


def test_each_layer_takes_its_place(folder, capsys):
    import from_torch

    steps = from_torch.main(["--model", str(folder), "--text", "What it reads, and how."])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["layer", "output", "decoded"]
    assert title.endswith("23 tokens")
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert all(line.endswith("same") for line in lines)
    assert [step.layer for step in steps] == [0, 1]
    assert all(0 < step.logits < 1e-5 for step in steps)  # it was not torch's layer that was called


def test_a_wrong_layer_is_named(folder, capsys, monkeypatch):
    import from_torch

    really = mqa_jax.torch_interop.hugging_face.families.rope_of
    wrong = lambda config: dataclasses.replace(really(config), interleaved=True)
    monkeypatch.setattr(mqa_jax.torch_interop.hugging_face.families, "rope_of", wrong)
    with pytest.raises(SystemExit, match=r"These layers differ: \[0\]. python -m mqa_jax.parity"):
        from_torch.main(["--model", str(folder), "--text", "What it reads.", "--layers", "1"])
    line = capsys.readouterr().out.splitlines()[1]
    assert "DIFFERS: " in line
    assert float(line.split()[5]) > 1e-3  # the logits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "There is no model in 'nowhere'"),
        (["--layers", "0"], "at least one layer: --layers 0"),
        (["--layers", "first"], "first"),
    ],
)
def test_what_it_cannot(arguments, message, capsys):
    import from_torch

    with pytest.raises(SystemExit) as caught:
        from_torch.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_too_short_a_text(folder, capsys):
    import from_torch

    with pytest.raises(SystemExit, match="2"):
        from_torch.main(["--model", str(folder), "--text", "No."])
    assert "More than 4 tokens are needed: --text 'No.'" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2(monkeypatch):
    """Real weights: the attention of all 30 layers on a text."""
    import from_torch

    own_process.read_gguf_once(monkeypatch)
    model, tokenizer = from_torch.load(from_torch.default_model())
    tokens: Any = tokenizer(4 * from_torch.TEXT, return_tensors="pt").input_ids[:, :LENGTH]
    assert tokens.shape == (1, LENGTH)
    steps = list(from_torch.replace_layers(model, tokens))
    assert len(steps) == 30
    for step in steps:
        assert step.report.passed, step.report.table()
        output = next(x for x in step.report.differences if x.name == "output")
        assert output.max_relative <= 2e-5
        assert output.shape == (1, LENGTH, 576)
    assert max(step.logits for step in steps) < 1e-4
    assert np.isfinite(steps[-1].logits)
