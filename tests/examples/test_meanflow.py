"""`examples/meanflow.py` in a small form: the loss falls, its derivative is that of the textbook's attention."""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import lobed_curves
import meanflow
import numpy as np
import pytest
from command_line import exit_with_a_sentence

SMALL = meanflow.Settings(points=12, heads=2, layers=1, dim=32, batch=32, steps=60, learning_rate=5e-3)


@pytest.fixture(scope="module", autouse=True)
def usual_promotion():
    """Optax adds integers to floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_run_learns_reports_and_draws(tmp_path, capsys):
    arguments = ["--points=12", "--heads=2", "--layers=1", "--dim=32", "--batch=32", "--steps=60"]
    meanflow.main([*arguments, "--learning-rate=0.005", f"--out={tmp_path / 'new'}"])
    of_samples, of_circle = map(float, re.findall(r"(\d\.\d{3}) (?:in|of)", capsys.readouterr().out))
    of_noise, _ = lobed_curves.nearest(jax.random.normal(jax.random.key(0), (100, 12, 2)))
    assert of_samples < 0.8 * np.median(of_noise)
    np.testing.assert_allclose(of_circle, 0.5 / 2**0.5, atol=0.01)
    assert (tmp_path / "new" / "meanflow.png").stat().st_size > 10_000


def test_the_error_falls():
    _, errors = meanflow.train(SMALL)
    assert np.mean(errors[-10:]) < 0.8 * np.mean(errors[:5])


def random_params(settings: meanflow.Settings) -> Any:
    """What is 0 in new parameters would hide the attention."""
    params = meanflow.first_state(settings).params
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(jax.tree.leaves(params), keys)]
    return jax.tree.unflatten(jax.tree.structure(params), moved)


@pytest.mark.slow
def test_the_gradient_is_that_with_textbook_attention():
    params, key = random_params(SMALL), jax.random.key(2)
    data = lobed_curves.draw(key, 8, SMALL.points)

    def gradient(attn_impl: str) -> Any:
        model = replace(SMALL, attn_impl=attn_impl).model
        return jax.jit(jax.grad(lambda params: meanflow.mean_flow_loss(model, params, data, key, 0.5)[0]))(params)

    found, expected = gradient("flash"), gradient("reference")
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))  # those of the keys' biases are 0
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * largest), found, expected)


def test_the_target_fits_a_flow_that_is_known():
    """Where all data are one point x, the velocity at z is (z - x) / t, at all times of a way the same."""
    point, key = jnp.ones((4, 5, 2)), jax.random.key(0)

    class Known:
        def apply(self, variables, z, r, t):
            return (z - 1) / t[:, None, None]

    _, error = meanflow.mean_flow_loss(Known(), {}, point, key, 1.0)  # type: ignore[arg-type]
    assert error < 1e-8


def test_data_are_nearest_to_themselves():
    distance, lobes = lobed_curves.nearest(
        lobed_curves.curves(jnp.array(lobed_curves.LOBES), jnp.array([0.1, 0.2]), 24)
    )
    assert (distance < 0.05).all()
    np.testing.assert_array_equal(lobes, lobed_curves.LOBES)


@pytest.mark.slow
def test_memory_of_a_step_grows_less_than_the_textbooks():
    table = meanflow.memory_table(SMALL, (1024, 2048)).splitlines()[2:]
    ours, plain = ([int(line.split()[column]) for line in table] for column in (1, 3))
    assert plain[1] > 3.5 * plain[0]
    assert ours[1] < 2.2 * ours[0] < plain[0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--points=2", "--points must be at least 3: points=2"),
        ("--apart=1.5", "--apart must be at most 1: apart=1.5"),
        ("--learning-rate=nan", "--learning-rate must be at least 0: learning_rate=nan"),
        ("--dim=33", "--dim must be even, for sines and cosines: dim=33"),
        ("--kv-heads=3", "heads must be a multiple of kv_heads: heads=4, kv_heads=3"),
        ("--attn-impl=fast", "attn_impl='fast'"),
    ],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        meanflow.main([option, f"--out={tmp_path}"])


def test_what_cannot_work_is_said_in_a_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        meanflow.main(["--steps=0"], refuse=exit_with_a_sentence)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --steps must be at least 1: steps=0.\n"
