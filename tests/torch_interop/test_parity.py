"""`parity.compare`: right conversions pass, and every wrong one that we could think of does not."""

import dataclasses
import json
import re
import sys
from typing import Any

import jax
import numpy as np
import pytest
import upstream_layers
from hf_layers import CONFIGS, hf_layer

import mqa_jax
from mqa_jax.torch_interop import from_torch, parity
from mqa_jax.torch_interop.parity import flax_side

pytestmark = pytest.mark.torch

X = np.random.default_rng(0).standard_normal((2, 11, 24))


def compare(layer: Any, module: Any, variables: Any, **options: Any) -> parity.Report:
    return parity.compare(module, variables, layer, X, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_transformers(name):
    """Outputs within 1e-5, gradients within 1e-4 or 1e-5 of the largest, and decoding from torch's own cache."""
    layer = hf_layer(name)
    report = compare(layer, *from_torch(layer))
    assert report.passed, report.table()
    names = {x.name for x in report.differences}
    assert {"output", "context", "d_x"} <= names
    assert ("decoded" in names) == (name != "bert")
    assert len(names) == len(list(layer.parameters())) + 3 + (name != "bert") - 2 * (name == "bert")  # its LayerNorm
    for difference in report.differences:
        allowed = max(1e-4, 1e-5 * difference.max_abs / max(difference.max_relative, 1e-30))
        assert difference.max_abs < (allowed if difference.name.startswith("d_") else 1e-5), report.table()


@pytest.mark.parametrize("name", upstream_layers.LAYERS)
def test_other_layers(name):
    """Also where gradients go through two projections that are one here."""
    layer = upstream_layers.LAYERS[name]()
    report = compare(layer, *from_torch(layer))
    assert report.passed, report.table()
    found = {x.name: x for x in report.differences}
    context = set() if name[:5] in ("knotg", "torch") else {"context"}
    decoded = {"decoded"} if name in ("mqa", "llm-foundry grouped") else set()
    assert set(found) == {"output", "d_x", *(f"d_{name}" for name, _ in layer.named_parameters()), *context, *decoded}
    assert found["output"].max_abs < 1e-5
    assert (report.errors is None) == (not context)


def changed(variables: Any, name: str, change: Any) -> Any:
    params = dict(variables["params"])
    params[name] = jax.tree.map(change, params[name])
    return {"params": params}


def swap(x):
    """Of the first two heads, or key/value heads."""
    axis = x.ndim - 2
    order = np.arange(x.shape[axis])
    order[:2] = order[:2][::-1]
    return np.take(x, order, axis=axis)


def drop(x):
    x = np.array(x)
    x[..., -1, :] = 0
    return x


def exchanged(module, variables):
    """Query and key, in grouped layers as far as heads go."""
    params = dict(variables["params"])
    heads = params["key"]["kernel"].shape[-2]
    query, key = params["query"], params["key"]
    put = lambda into, x: np.concatenate([x[..., :heads, :], into[..., heads:, :]], axis=-2)
    params["query"], params["key"] = jax.tree.map(put, query, key), jax.tree.map(lambda x: x[..., :heads, :], query)
    return module, {"params": params}


WRONG: dict[str, Any] = {
    "two heads swapped": lambda module, variables: (module, changed(variables, "query", swap)),
    "q and k exchanged": exchanged,
    "last kv head dropped": lambda module, variables: (module, changed(variables, "value", drop)),
    "rotary convention": lambda module, variables: (
        module.clone(rope=dataclasses.replace(module.rope, interleaved=True)),
        variables,
    ),
    "NaN": lambda module, variables: (module, changed(variables, "out", lambda x: np.where(x == x.max(), np.nan, x))),
}


@pytest.mark.parametrize("name", [*CONFIGS, *upstream_layers.LAYERS])
def test_wrong_conversions_are_caught(name):
    layer = hf_layer(name) if name in CONFIGS else upstream_layers.LAYERS[name]()
    module, variables = from_torch(layer)
    for kind, spoil in WRONG.items():
        if kind == "rotary convention" and module.rope is None:
            continue
        report = compare(layer, *spoil(module, variables), prompt=0)
        output = next(x for x in report.differences if x.name == "output")
        assert not report.passed, kind
        assert not output.passed, kind
        assert (report.worst.ours > 1e-3) or np.isnan(report.worst.ours)


@pytest.fixture
def compiled_anew():
    """What was compiled before a function was patched, or with the patch, is forgotten."""
    step: Any = flax_side.step
    step.clear_cache()
    yield
    step.clear_cache()


def test_a_wrong_cache_is_caught(monkeypatch, compiled_anew):
    """The full pass is right; only decoding is not."""
    from mqa_jax.cache import append

    layer = hf_layer("llama")
    really = append._write_rows
    monkeypatch.setattr(append, "_write_rows", lambda old, new, start, fits: really(old, new, start * 0, fits))
    report = compare(layer, *from_torch(layer))
    assert [x.name for x in report.differences if not x.passed] == ["decoded"]
    assert report.worst.name == "decoded"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype):
    import torch

    layer = hf_layer("llama").to(getattr(torch, dtype))
    report = compare(layer, *from_torch(layer))
    assert report.passed, report.table()
    output = next(x for x in report.differences if x.name == "output")
    assert output.theirs > 1e-4  # whose rounding it is


def test_table_json_and_plot(tmp_path):
    layer = hf_layer("llama")
    module, variables = from_torch(layer)
    report = compare(layer, module, changed(variables, "query", swap), prompt=0)
    title, *lines = report.table().splitlines()
    assert title.split()[:3] == ["tensor", "shape", "max"]
    assert len(lines) == len(report.differences)
    assert {line.split()[0] for line in lines if line.endswith("FAILED")} >= {"output", "d_q_proj.weight"}
    written = json.loads(report.to_json())
    assert written["passed"] is False
    assert {row["name"] for row in written["differences"]} == {x.name for x in report.differences}
    assert report.errors is not None
    assert report.errors.shape == (6, 22)
    assert report.errors[2:].max() < 1e-5 < report.errors[:2].max()  # the two heads that were swapped
    report.plot(tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")


def llama_folder(path: Any, **settings: Any) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=2, intermediate_size=8)
    transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=9)).save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | settings))
    return path


def without_weights(path):
    (path / "model.safetensors").unlink()


CANNOT: dict[str, tuple[dict[str, Any], list[str], Any, str]] = {
    "no such layer": ({}, ["--layer", "2"], None, r"There is no layer 2 in .*: they are 0 to 1"),
    "a negative layer": ({}, ["--layer", "-1"], None, r"There is no layer -1 in .*: they are 0 to 1"),
    "model type": (dict(model_type="gpt2"), [], None, r"No known attention layer: model_type='gpt2'"),
    "quantised": (dict(quantization_config=dict(quant_method="fp8")), [], None, r"quant_method='fp8'"),
    "no weights": ({}, [], without_weights, r"There are no weights in"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_the_command_says_what_it_cannot(name, tmp_path, capsys):
    """In one line, with status 2."""
    settings, options, spoil, message = CANNOT[name]
    folder = llama_folder(tmp_path, **settings)
    if spoil:
        spoil(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        parity.main([str(folder), *options])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


def test_the_command_on_nothing(capsys):
    for arguments, message in (
        (["nowhere"], "nowhere"),
        (["x", "--layer", "first"], "first"),
        (["x", "--length=0"], "0"),
    ):
        with pytest.raises(SystemExit) as caught:
            parity.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_the_command_without_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match=r"2"):
        parity.main(["nowhere"])
    assert "This command needs PyTorch: pip install 'mqa-jax[torch]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    """On a checkpoint of two layers; and with another rotary convention."""
    llama_folder(tmp_path)
    reports = parity.main(
        [str(tmp_path), "--length", "7", "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    )
    assert list(reports) == [0, 1]
    assert "2 of 2 layers agree in float32" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "p.json").read_text())) == {"0", "1"}
    really = mqa_jax.torch_interop.hugging_face.families.rope_of
    wrong = lambda config: dataclasses.replace(really(config), interleaved=True)
    monkeypatch.setattr(mqa_jax.torch_interop.hugging_face.families, "rope_of", wrong)
    with pytest.raises(SystemExit, match=r"1 of 1 layers differ; the worst tensor of each: \{1: "):
        parity.main([str(tmp_path), "--layer", "1", "--length", "7"])
