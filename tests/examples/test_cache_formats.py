"""The example that measures caches: on the real model, what it is for; on a small one, that it tells the truth."""

import json
import re
from dataclasses import replace
from pathlib import Path

import cache_formats
import jax
import jax.numpy as jnp
import numpy as np
import own_process
import pytest
import small_model
from cache_report import agreement
from checkpoints import load_checkpoint
from llama import Llama, LlamaConfig
from tokens import load_text

import mqa_jax
from mqa_jax import quantization
from mqa_jax.cache import layout

TOKENS = 431  # two chunks, and 31 one by one, each of which reads all weights
PERPLEXITY_CHANGE = 0.005
LAYER_ERROR = cache_formats.LayerError(largest=0.09, rms=0.06)  # twice what was measured in the worst layer

# -- the real model ---------------------------------------------------------------------------------------------------


def _measure(path: str) -> None:
    """Perplexities with a float32 cache, with int8, and with int8 whose scales are wrong; of int8 also the errors."""
    config, params, metadata = load_checkpoint()
    params = jax.tree.map(jnp.asarray, params)
    tokens = cache_formats.passage(load_text(metadata), config, TOKENS)
    in_float32, in_int8 = (replace(config, cache_dtype=name) for name in ("float32", "int8"))
    float32 = cache_formats.read(in_float32, params, tokens)
    errors = cache_formats.layer_errors(in_int8, params, float32.layers)
    perplexities = {"float32": float32.perplexity, "int8": cache_formats.read(in_int8, params, tokens).perplexity}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantization, "quantize", _with_halved_scales(quantization.quantize))
        jax.clear_caches()  # the compiled layer, with the right scales
        perplexities["int8, scales halved"] = cache_formats.read(in_int8, params, tokens).perplexity
    caches = mqa_jax.init_cache(Llama(in_int8), 1, TOKENS, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    dtypes = [jax.tree.map(lambda x: x.dtype.name, layer["attention"]) for layer in caches.values()]
    Path(path).write_text(json.dumps({"perplexities": perplexities, "errors": errors, "dtypes": dtypes}))


def _with_halved_scales(quantize):
    def halved(x, dtype):
        quantized, scale = quantize(x, dtype)
        return quantized, scale / 2

    return halved


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("measured") / "measured.json")
    own_process.run(f"import test_cache_formats; test_cache_formats._measure({path!r})")
    return json.loads(Path(path).read_text())


def _change(measured, cache_dtype):
    return abs(measured["perplexities"][cache_dtype] / measured["perplexities"]["float32"] - 1)


@pytest.mark.slow
def test_perplexity_with_an_int8_cache(measured):
    assert _change(measured, "int8") <= PERPLEXITY_CHANGE


@pytest.mark.slow
def test_perplexity_tells_wrong_scales(measured):
    assert _change(measured, "int8, scales halved") > PERPLEXITY_CHANGE


@pytest.mark.slow
def test_error_of_each_layer_with_an_int8_cache(measured):
    errors = np.array(measured["errors"])
    assert errors.shape == (30, 2)
    assert (errors > 0).all()
    assert (errors <= LAYER_ERROR).all()


@pytest.mark.slow
def test_every_layer_caches_in_int8(measured):
    stored = dict.fromkeys((layout.KEY, layout.VALUE), "int8")
    scales = dict.fromkeys((layout.KEY_SCALE, layout.VALUE_SCALE), "float32")
    assert measured["dtypes"] == [{**stored, **scales, layout.INDEX: "int32"}] * 30


# -- a small one ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_model.write(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
def test_the_example_prints_what_it_measured(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cache_formats, "CHUNK", 16)
    plot = tmp_path / "errors.png"
    results = cache_formats.main(["--model", str(folder), "--tokens", "40", "--plot", str(plot)])
    printed = capsys.readouterr().out
    layers, heads, features, scale = 2, 2, 8, 4
    float32, bfloat16, int8, float8 = results
    assert float32.bytes_per_token == 2 * bfloat16.bytes_per_token == 2 * layers * heads * features * 4
    assert int8.bytes_per_token == float8.bytes_per_token == 2 * layers * heads * (features + scale)
    assert "40 tokens of Python" in printed
    for result in results:
        (row,) = (line.split() for line in printed.splitlines() if line.split()[:1] == [result.cache_dtype])
        change = result.perplexity / float32.perplexity - 1
        assert row[1:5] == [
            f"{result.bytes_per_token}",
            f"{result.bytes_per_token / bfloat16.bytes_per_token:.1%}",
            f"{result.perplexity:.3f}",
            f"{change:+.2%}",
        ]
    assert not float32.errors
    for errors in zip(*(result.errors for result in (bfloat16, int8, float8))):
        assert 0 < errors[0].rms < errors[1].rms < errors[2].rms < 0.5
    assert printed.splitlines()[-1].split()[-2:] == [f"{x:.3%}" for x in float8.errors[-1]]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tied_embeddings", [False, True])
def test_perplexity_layer_by_layer_is_that_of_the_whole_model(tied_embeddings, monkeypatch):
    """Read without a cache at all."""
    monkeypatch.setattr(cache_formats, "CHUNK", 8)
    config = LlamaConfig(
        vocabulary=50,
        layers=2,
        dim=16,
        hidden=24,
        heads=4,
        kv_heads=2,
        head_dim=4,
        max_length=32,
        tied_embeddings=tied_embeddings,
    )
    tokens = np.random.default_rng(0).integers(0, 50, 21)
    logits, variables = Llama(config).init_with_output(jax.random.key(0), jnp.asarray(tokens[None, :-1]))
    probable = jax.nn.log_softmax(logits[0])[np.arange(20), tokens[1:]]
    reading = cache_formats.read(config, variables["params"], tokens)
    np.testing.assert_allclose(reading.perplexity, np.exp(-np.mean(probable)), rtol=1e-5)
    assert cache_formats.layer_errors(config, variables["params"], reading.layers) == [(0.0, 0.0)] * 2


def test_the_error_of_a_layer():
    expected = jnp.array([[[4.0, 0.0], [0.0, -3.0]]])
    error = cache_formats.layer_error(expected.at[0, 1, 1].add(0.5), expected)
    np.testing.assert_allclose(error, (0.5 / 4, 0.5 / 5))


def test_agreement_ends_at_the_first_difference():
    assert agreement([1, 2, 3, 4], [1, 2, 5, 4]) == 2
    assert agreement([1, 2], [1, 2, 5, 4]) == 2
    assert cache_formats.until_end([5, 6, 0, -1, -1], cache_formats.Sampling(5, end=(0,))) == [5, 6]


def test_a_passage_that_is_too_long(folder):
    config, _, metadata = load_checkpoint(folder)
    with pytest.raises(ValueError, match="tokens=1 to 256: tokens=257"):
        cache_formats.passage(load_text(metadata), config, 257)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "Text and model allow tokens=1 to 256: tokens=0"),
        (["--plot", "/nowhere/plot.png"], r"needs an existing folder .*: --plot='/nowhere/plot.png'"),
        (["--plot", "plot.docx"], r"one of the file types .*'png'.*: --plot='plot.docx'"),
        (["--model", "/nowhere"], "path='/nowhere', which does not exist"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_in_a_sentence(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cache_formats.main(["--model", str(folder), *arguments])
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert re.search(message, said), said
