"""The fuzz command judges problems, and says how to see one that failed again."""

import fuzz
import numpy as np
import pytest

from mqa_jax.kernels import online_softmax


def test_structures_are_drawn_that_the_ways_can_compute():
    found = [fuzz.structure(list(fuzz.WAYS), np.random.default_rng(n)) for n in range(200)]
    assert {of.way for of in found} == set(fuzz.WAYS)
    assert {of.dtype for of in found} == set(fuzz.DTYPES)
    for option in fuzz.option_space.OPTIONS | fuzz.option_space.LEADING_PAST:
        assert len({str(of.row[option]) for of in found}) > 1, option


@pytest.fixture
def few(monkeypatch):
    """Two small problems."""
    monkeypatch.setattr(fuzz, "PROBLEMS", 2)
    monkeypatch.setattr(fuzz, "DTYPES", ("float32",))
    monkeypatch.setattr(fuzz, "WAYS", {name: fuzz.WAYS[name] for name in ["xla, few queries"]})


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_it_judges_and_counts(capsys):
    assert fuzz.main(["--minutes", "0.001", "--seed", "5", "--implementation", "xla"]) == 0
    assert "2 problems judged with --seed 5, 0 failed." in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("few")
def test_a_broken_kernel_is_found_and_replayed(monkeypatch, capsys):
    finish = online_softmax.finish

    def broken(state, sink=None):
        out, normalizer = finish(state, sink)
        return out * 1.001, normalizer

    monkeypatch.setattr(online_softmax, "finish", broken)
    assert fuzz.main(["--minutes", "0.001", "--seed", "5", "--implementation", "xla"]) == 1
    printed = capsys.readouterr().out
    call = next(line for line in printed.splitlines() if line.startswith("import fuzz; fuzz.replay("))
    with pytest.raises(AssertionError, match=r"error .* is more than"):
        exec(call)
    monkeypatch.setattr(online_softmax, "finish", finish)
    exec(call)
