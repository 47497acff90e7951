"""`examples/train_lm.py` in a small form: it learns, resumes to the same losses, compiles once, writes as it reads."""

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import manual
import numpy as np
import pytest
import train_lm
from command_line import exit_with_a_sentence
from train_checkpoints import open_checkpoints
from train_report import read, smooth, write, write_text

SMALL = train_lm.Settings(
    kv_heads=2, heads=4, layers=1, dim=32, hidden=64, length=32, batch=16, steps=100, learning_rate=0.02, dropout=0.1
)
REMAT = replace(SMALL, remat=True)
ROOT = Path(train_lm.__file__).parents[1]

# Runs the example, and kills it when seven steps are done.
KILLED = """
import os, signal, sys, train_lm

def make_deadly_step(settings):
    step = make_step(settings)
    def deadly_step(state, text):
        if state.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(state, text)
    return deadly_step

make_step, train_lm.make_step = train_lm.make_step, make_deadly_step
train_lm.main(sys.argv[1:])
"""


def _arguments(settings: train_lm.Settings, out: Path, *more: str) -> list[str]:
    names = "heads", "layers", "dim", "hidden", "length", "batch", "steps", "learning_rate", "dropout", "seed"
    options = [f"--{name.replace('_', '-')}={getattr(settings, name)}" for name in names]
    small = ["--decode-rows=2", "--decode-length=32"]
    return [f"--kv-heads={settings.kv_heads}", *options, *small, f"--out={out}", *more]


@pytest.fixture(scope="module", autouse=True)
def usual_promotion():
    """Optax adds integers to floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_steps():
    """A step that is compiled serves all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_lm, "make_step", functools.cache(train_lm.make_step))
        yield


@pytest.fixture(scope="module")
def text():
    return manual.load_text()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: its folder, its results, and what it printed."""
    out, printed = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        results = train_lm.main([*_arguments(SMALL, out), "--kv-heads", "4", "2", "1"])
    return out, results, printed.getvalue()


@pytest.fixture(scope="module")
def params(finished, text):
    return train_lm.train(SMALL, text, finished[0] / "kv_heads_2", save_every=50).params


@pytest.fixture(scope="module")
def prompt(text):
    return text.held_out[None, :8].astype(jnp.int32)


def _entropy(text: np.ndarray) -> float:
    """Nats a byte of who knows only how often each byte occurs."""
    shares = np.bincount(text) / text.size
    return -float(shares[shares > 0] @ np.log(shares[shares > 0]))


@pytest.mark.slow
def test_every_model_learns_from_the_text(finished, text):
    for result in finished[1]:
        assert result.losses.shape == (SMALL.steps,)
        assert abs(result.losses[0] - np.log(256)) < 1
        assert max(smooth(result.losses)[-1], result.held_out) < _entropy(np.asarray(text.train)) - 0.2


def test_the_text_held_out_is_no_training_text(text):
    share = text.held_out.size / (text.train.size + text.held_out.size)
    assert abs(share - manual.HELD_OUT) < 0.005
    assert bytes(np.asarray(text.held_out[-200:])) not in bytes(np.asarray(text.train))


@pytest.mark.slow
def test_a_smaller_cache_for_fewer_key_value_heads(finished):
    assert [result.cache_bytes_per_token for result in finished[1]] == [4 * 64, 2 * 64, 64]  # K * 2 * H * 4 bytes
    assert [result.name for result in finished[1]] == ["MHA", "GQA", "MQA"]


@pytest.mark.slow
def test_table(finished):
    _, results, printed = finished
    header, *rows = [
        line for line in printed.splitlines() if line.lstrip().startswith(("kv heads", "MHA", "GQA", "MQA"))
    ][-4:]
    assert header.split()[-4:] == ["cache", "bytes/token", "decode", "tokens/s"]
    for row, result in zip(rows, results, strict=True):
        name, kv_heads, _, _, held_out, cached, speed = row.split()
        assert (name, int(kv_heads), int(cached)) == (result.name, result.kv_heads, result.cache_bytes_per_token)
        assert held_out == f"{result.held_out:.3f}"
        assert float(speed.replace(",", "")) > 0
        assert f"{name} writes: {result.sample}" in printed


@pytest.mark.slow
def test_plot(finished):
    picture = (finished[0] / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 20_000


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_losses(finished, tmp_path):
    arguments = _arguments(SMALL, tmp_path, "--checkpoint-every=5")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)])}
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with open_checkpoints(tmp_path / "kv_heads_2") as manager:
        assert manager.latest_step() == 5

    (resumed,) = train_lm.main([*arguments, "--checkpoint-every=50", "--resume"])
    np.testing.assert_array_equal(resumed.losses, finished[1][1].losses)
    assert not np.isnan(resumed.losses).any()


@pytest.mark.slow
def test_a_finished_run_is_only_loaded(finished, text, monkeypatch):
    out, results, _ = finished
    monkeypatch.setattr(train_lm, "save", None)
    state = train_lm.train(SMALL, text, out / "kv_heads_2", save_every=5)
    np.testing.assert_array_equal(state.losses, results[1].losses)


@pytest.mark.slow
def test_checkpoints_are_never_overwritten(finished):
    out = finished[0]
    with pytest.raises(FileExistsError, match=r"kv_heads_2 holds step=100\. Continue it with --resume, or .* --out"):
        train_lm.main(_arguments(SMALL, out))


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_settings(finished, text):
    other = replace(SMALL, batch=4, dropout=0.0)
    with pytest.raises(ValueError, match=r"batch=4 \(was 16\), dropout=0\.0 \(was 0\.1\), step=100 in .*kv_heads_2"):
        train_lm.train(other, text, finished[0] / "kv_heads_2", save_every=5)
    shorter = text._replace(train=text.train[1:])
    with pytest.raises(ValueError, match=r"text_checksum=\d+ \(was \d+\)"):
        train_lm.train(SMALL, shorter, finished[0] / "kv_heads_2", save_every=5)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--kv-heads=3", "heads must be a multiple of kv_heads: heads=4, kv_heads=3"),
        ("--batch=5000", r"fit into the \d+ bytes that are held out: batch=5000, length=32"),
        ("--prompt=", "at least one byte, and fewer than a training text: prompt='', length=32"),
        ("--checkpoint-every=0", "--checkpoint-every must be at least 1: checkpoint_every=0"),
        ("--heads=0", "--heads must be at least 1: heads=0"),
        ("--learning-rate=nan", "--learning-rate must be at least 0: learning_rate=nan"),
        ("--dropout=1", r"--dropout must be less than 1: dropout=1\.0"),
        ("--seed=-1", "--seed must be at least 0: seed=-1"),
        ("--temperature=-1", r"--temperature must be at least 0: temperature=-1\.0"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        train_lm.main(_arguments(SMALL, tmp_path, option))


def test_what_cannot_work_is_said_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_lm.main(_arguments(SMALL, tmp_path, "--steps=0"), refuse=exit_with_a_sentence)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --steps must be at least 1: steps=0.\n"


def test_a_step_compiles_once_and_consumes_its_state(text):
    step: Any = train_lm.make_step(REMAT)
    first = train_lm.first_state(REMAT)
    state = step(first, text.train)
    assert all(x.is_deleted() for x in jax.tree.leaves(first))
    step(step(state, text.train), text.train)
    assert step._cache_size() == 1


def test_a_second_compilation_is_an_error(text):
    step: Any = train_lm.make_step(replace(SMALL, seed=1))
    state = train_lm.first_state(SMALL)
    step.trace(state, text.train)
    with pytest.raises(AssertionError, match="'step' is traced > 1 times"):
        step.trace(state, text.train[:-1])


@pytest.mark.slow
def test_remat_changes_no_loss(finished, text):
    step, state = train_lm.make_step(REMAT), train_lm.first_state(REMAT)
    for _ in range(5):
        state = step(state, text.train)
    np.testing.assert_allclose(state.losses[:5], finished[1][1].losses[:5], rtol=1e-5)


@pytest.mark.slow
def test_dropout_follows_its_key(params, text):
    texts = train_lm.tokens_and_labels(text.train[:66].reshape(2, 33).astype(jnp.int32))

    @jax.jit
    def loss(key):
        return train_lm.mean_loss(SMALL.model, params, texts, deterministic=False, rngs={"dropout": key})

    assert loss(jax.random.key(0)) == loss(jax.random.key(0)) != loss(jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [SMALL, REMAT], ids=["", "remat"])
def test_the_cache_continues_as_the_whole_text_does(params, prompt, settings):
    model: Any = settings.model
    tokens = jnp.zeros((1, 32), jnp.int32).at[:, :8].set(prompt)
    continued = jax.jit(lambda tokens: model.apply({"params": params}, tokens).argmax(-1))
    for end in range(8, 32):  # causal: what is still zero behind it has no effect
        tokens = tokens.at[:, end].set(continued(tokens)[:, end - 1])
    np.testing.assert_array_equal(write_text(model, params, prompt, 24, 0.0, seed=0), tokens[:, 8:])


@pytest.mark.slow
def test_writing_goes_on_where_it_stopped(params, prompt):
    key = jax.random.key(0)
    whole = write_text(SMALL.model, params, prompt, 24, 0.0, seed=0)
    logits, cache = read(SMALL.model, params, prompt, 32)
    parts = []
    for _ in range(2):
        tokens, logits, cache = write(SMALL.model, params, cache, logits, 12, 0.0, key)
        parts.append(tokens)
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), whole)


@pytest.mark.slow
def test_samples_follow_the_seed_with_a_temperature(params, prompt):
    one, same, other = (np.asarray(write_text(SMALL.model, params, prompt, 24, 1.0, seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_a_step_of_the_nnx_model_is_that_of_the_linen_model():
    """From the same parameters to the same, without dropout; with it the loss falls."""
    linen, nnx = (replace(SMALL, dropout=0.0, api=api) for api in ("linen", "nnx"))
    text, state = manual.load_text(), train_lm.first_state(nnx)
    copy = jax.tree.map(jnp.copy, state)
    expected, after = train_lm.make_step(linen)(state, text.train), train_lm.make_step(nnx)(copy, text.train)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), after.params, expected.params)
    np.testing.assert_allclose(after.losses[0], expected.losses[0], rtol=1e-6)
    dropping = replace(SMALL, api="nnx", remat=True, steps=20)
    state, step = train_lm.first_state(dropping), train_lm.make_step(dropping)
    for _ in range(20):
        state = step(state, text.train)
    assert state.losses[-1] < state.losses[0] - 1
