"""examples/sentences.py: MiniLM, six BERT layers with real weights, against transformers."""

import json
import re
from typing import Any

import jax
import numpy as np
import pytest
import sentences
from hf_layers import CONFIGS

from mqa_jax.torch_interop import from_torch, parity

pytestmark = pytest.mark.torch

TEXTS = [
    "A man is eating.",
    "Someone has lunch.",
    "The stock market fell.",
    "Shares lost a tenth of their value.",
    "Yes.",
    "How many key and value heads does a multi-query layer have?",
    "One, and all heads of the queries share it.",
    "Attention is a weighted mean of values.",
    "Rotary positions turn pairs of features.",
    "Paris is the capital of France.",
    "The capital of France, on the Seine, has two million inhabitants.",
    "She sold sea shells by the sea shore.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "3.14159 26535 89793",
    "Na\u00efve caf\u00e9s opened in 2026 \u2026",
    "The quick brown fox jumps over the lazy dog, which does not mind at all, because it is asleep in the sun.",
    "It rained.",
    "It did not rain.",
    "A river flooded the old town last night, after three days of rain; nobody was hurt.",
    "Ein Satz auf Deutsch.",
]


def of_torch(folder: Any, texts: list[str]) -> tuple[Any, np.ndarray]:
    """The model, and its sentence embeddings."""
    import torch
    from transformers import AutoModel

    auto: Any = AutoModel
    model = auto.from_pretrained(folder, attn_implementation="eager").eval()
    tokens, mask = (torch.from_numpy(x).long() for x in sentences.tokenize(folder, texts))
    with torch.no_grad():
        hidden = model(tokens, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return model, torch.nn.functional.normalize(mean).numpy()


@pytest.mark.slow
def test_minilm(capsys):
    """Embeddings of 20 sentences of many lengths; and each layer by itself, with all its gradients."""
    folder = sentences.default_model()
    model, theirs = of_torch(folder, TEXTS)
    ours = sentences.embed(folder, TEXTS)
    assert ours.shape == theirs.shape == (20, 384)
    assert (np.sum(ours * theirs, axis=1) >= 0.99999).all()
    assert (np.sum(ours * np.roll(theirs, 1, axis=0), axis=1) < 0.9).all()  # these are different sentences
    x = np.random.default_rng(0).standard_normal((2, 9, 384))
    for block in model.encoder.layer:
        report = parity.compare(*from_torch(block.attention), block.attention, x)
        assert report.passed, report.table()
    alike = sentences.main(TEXTS[:4])
    np.testing.assert_allclose(alike, theirs[:4] @ theirs[:4].T, atol=1e-5)
    assert capsys.readouterr().out.splitlines()[0].split()[0] == "1.00"


def test_a_small_bert(tmp_path):
    """Random weights, where attention is not as even as it may be in a trained model."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings: Any = dict(CONFIGS["bert"], vocab_size=30, num_hidden_layers=2, max_position_embeddings=16)
    transformers.BertModel(transformers.BertConfig(**settings, initializer_range=0.5)).save_pretrained(tmp_path)
    model, params = sentences.load(tmp_path)
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(30, size=(3, 7)).astype(np.int32), np.arange(7) < np.array([[7], [3], [1]])
    theirs: Any = transformers.BertModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        hidden = theirs(torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())[0].numpy()
    mean = np.sum(hidden * mask[..., None], axis=1) / mask.sum(1, keepdims=True)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(jax.jit(model.apply)({"params": params}, tokens, mask), expected, atol=1e-5)
    written = json.loads((tmp_path / "config.json").read_text())
    for fields in (dict(hidden_act="relu"), dict(is_decoder=True), dict(add_cross_attention=True)):
        (tmp_path / "config.json").write_text(json.dumps(written | fields))
        with pytest.raises(NotImplementedError, match=re.escape(f"}}: {fields}.")):
            sentences.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "1_Pooling").mkdir()
    modes = dict(pooling_mode_mean_tokens=False, pooling_mode_cls_token=True)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    with pytest.raises(NotImplementedError, match="'pooling_mode_cls_token': True"):
        sentences.load(tmp_path)


def test_what_it_cannot(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match="2"):
            sentences.main(["Yes.", "--model", str(folder)])
        assert "config.json" in capsys.readouterr().err
