"""`examples/train_sharded.py` in a small form: the same losses on every mesh, in one process and in two."""

import json
import re
from typing import Any

import jax
import numpy as np
import pytest
import train_sharded
from command_line import exit_with_a_sentence
from test_processes import run_processes

SMALL = dict(heads=4, layers=1, dim=32, hidden=64, length=32, batch=8, steps=12, dropout=0.1, learning_rate=0.02)
CUT = "--sequence-axis=2", "--order=zigzag"
PROGRAM = """
import json, sys, train_sharded
print("losses", json.dumps(train_sharded.main(sys.argv[1:]).tolist()))
"""


def _arguments(out: Any, *more: str, **settings: Any) -> list[str]:
    options = [f"--{name.replace('_', '-')}={x}" for name, x in (SMALL | settings).items()]
    return [*options, f"--out={out}", *more]


def _trained(processes: int, *arguments: str) -> list[Any]:
    """The losses, as each process has them."""

    def command(coordinator: str, number: int) -> list[str]:
        place = [f"--coordinator={coordinator}", f"--processes={processes}", f"--process={number}"]
        return ["-c", PROGRAM, *arguments, *(place if processes > 1 else [])]

    found = [re.findall(r"^losses (.*)$", text, re.MULTILINE) for text in run_processes(command, processes)]
    return [json.loads(line) for (line,) in found]


@pytest.mark.slow
def test_the_losses_are_the_same_on_every_mesh(tmp_path):
    """On one device; on 2 x 2 of two processes; resumed on 8, 4 for 2 key/value heads, with texts that 2 share."""
    (expected,) = _trained(1, *_arguments(tmp_path / "one", "--devices=1"))
    assert len(expected) == 12
    assert expected[-1] < expected[0] - 0.5
    many = tmp_path / "many"
    first, same = _trained(2, *_arguments(many, "--devices=2", "--model-axis=2", "--stop-at=6"))
    (resumed,) = _trained(1, *_arguments(many, "--devices=8", "--model-axis=4", *CUT, "--resume"))
    assert (len(first), same, resumed[:6]) == (6, first, first)
    np.testing.assert_allclose(resumed, expected, rtol=2e-4)
    assert (many / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


REFUSED = {
    "--model-axis=3": "must divide the number of devices: model_axis=3, sequence_axis=1, devices=8",
    "--sequence-axis=3": "must divide the number of devices: model_axis=1, sequence_axis=3, devices=8",
    "--model-axis=8": "heads=4, model_axis=8, batch=8, data axis=1",
    "--batch=6": "heads=4, model_axis=1, batch=6, data axis=8",
    "--order=zigzag --sequence-axis=8 --length=24": "length=24, sequence_axis=8, order=zigzag",
    "--devices=0": "--devices must be at least 1: devices=0",
    "--stop-at=13": "--stop-at must be one of the steps: stop_at=13, steps=12",
    "--process=1": "Several processes need all of --coordinator, --processes and --process: .*'process': 1",
    "--heads=0": "--heads must be at least 1: heads=0",
    "--kv-heads=3": "heads must be a multiple of kv_heads: heads=4, kv_heads=3",
}


@pytest.mark.parametrize(("option", "message"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_training(tmp_path, monkeypatch, option, message):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    monkeypatch.setattr(jax, "make_mesh", lambda *arguments, **options: None)
    with pytest.raises(ValueError, match=message):
        train_sharded.main(_arguments(tmp_path, *option.split()))


def test_what_cannot_work_is_said_in_a_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_sharded.main(_arguments(tmp_path, "--steps=0"), refuse=exit_with_a_sentence)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --steps must be at least 1: steps=0.\n"
