"""Rotary embeddings, their scalings, ALiBi slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mqa_jax

X = jax.random.normal(jax.random.key(0), (2, 7, 3, 8))
POSITIONS = jnp.arange(7)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_rotation_of_complex_numbers(interleaved):
    """Pair i as a complex number, times exp(i * position * theta ** (-2 i / H))."""
    rope = mqa_jax.Rope(theta=100.0, interleaved=interleaved)
    x = np.asarray(X, np.float64)
    pair = (lambda x: (x[..., 0::2], x[..., 1::2])) if interleaved else (lambda x: np.split(x, 2, axis=-1))
    first, second = pair(x)
    angle = np.arange(7)[:, None, None] * 100.0 ** (-np.arange(0, 8, 2) / 8)
    expected = (first + 1j * second) * np.exp(1j * angle)
    actual = pair(np.asarray(rope(X, POSITIONS)))
    np.testing.assert_allclose(actual[0], expected.real, atol=1e-5)
    np.testing.assert_allclose(actual[1], expected.imag, atol=1e-5)


def test_rope_depends_on_distance_alone():
    rope = mqa_jax.Rope()
    score = lambda shift: jnp.einsum("btnh,bsnh->bnts", rope(X, POSITIONS + shift), rope(X, POSITIONS + shift))
    np.testing.assert_allclose(score(0), score(1000), atol=2e-3)


def test_rope_of_rows_at_different_positions():
    rope = mqa_jax.Rope()
    rows = rope(X, jnp.array([[0], [5]]) + POSITIONS)
    np.testing.assert_array_equal(rows[1], rope(X[1], POSITIONS + 5))


def test_rope_keeps_the_dtype_and_computes_in_float32():
    half = X.astype(jnp.bfloat16)
    far = POSITIONS + 30_001  # bfloat16 could not even count so far
    out = mqa_jax.Rope()(half, far)
    assert out.dtype == jnp.bfloat16
    expected = mqa_jax.Rope()(half.astype(jnp.float32), far)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8)


def test_linear_scaling():
    scaled = mqa_jax.Rope(scaling=mqa_jax.LinearScaling(factor=4.0))
    np.testing.assert_allclose(scaled(X, POSITIONS * 4), mqa_jax.Rope()(X, POSITIONS), atol=1e-5)


def test_a_table_of_factors():
    factors = (1.0, 2.0, 4.0, 8.0)
    scaled = mqa_jax.Rope(scaling=mqa_jax.TableScaling(factors=factors)).frequencies(8)
    np.testing.assert_allclose(scaled, mqa_jax.Rope().frequencies(8) / np.array(factors), rtol=1e-6)


def test_llama3_scaling_as_a_table():
    """As GGUF files of Llama 3 have it."""
    plain = mqa_jax.Rope().frequencies(64)
    scaled = mqa_jax.Rope(scaling=mqa_jax.Llama3Scaling())
    table = mqa_jax.Rope(scaling=mqa_jax.TableScaling(factors=tuple((plain / scaled.frequencies(64)).tolist())))
    np.testing.assert_allclose(table.frequencies(64), scaled.frequencies(64), rtol=1e-6)


def test_yarn_in_numbers():
    """A ramp over the pairs, from the ones that turn 4 times in 64 positions to those that turn once."""
    rope = mqa_jax.Rope(
        theta=10.0,
        scaling=mqa_jax.YarnScaling(factor=8.0, original_max_position_embeddings=64, beta_fast=4.0),
    )
    low, high = np.floor(8 * np.log10(64 / (2 * np.pi * 4))), np.ceil(8 * np.log10(64 / (2 * np.pi)))
    slow = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    expected = 10.0 ** (-np.arange(8) / 8) * (1 - slow * 7 / 8)
    assert 0 < low < high < 15
    np.testing.assert_allclose(rope.frequencies(16), expected, rtol=1e-6)
    length = lambda x: jnp.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(length(rope(X, POSITIONS)) / length(X), 0.1 * np.log(8) + 1, rtol=1e-6)


YARN = dict(factor=4.0, original_max_position_embeddings=128)
SCALINGS = {
    "default": ("default", {}),
    "linear": ("linear", dict(factor=4.0)),
    "llama3": (
        "llama3",
        dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "yarn": ("yarn", YARN),
    "yarn of a wide ramp": ("yarn", YARN | dict(beta_fast=20.0, beta_slow=0.5)),
    "yarn from pair to pair": ("yarn", YARN | dict(truncate=False)),
    "yarn of one pair": ("yarn", YARN | dict(beta_fast=2.0, beta_slow=2.0, truncate=False)),
    "yarn in a short context": ("yarn", YARN | dict(original_max_position_embeddings=4)),
    "yarn of DeepSeek": ("yarn", YARN | dict(mscale=0.7, mscale_all_dim=1.3)),
    "yarn with half of DeepSeek's": ("yarn", YARN | dict(mscale=0.7)),
    "yarn with a magnitude": ("yarn", YARN | dict(attention_factor=0.75)),
    "yarn that shortens": ("yarn", YARN | dict(factor=0.5)),
}
CLASSES = {"linear": mqa_jax.LinearScaling, "llama3": mqa_jax.Llama3Scaling, "yarn": mqa_jax.YarnScaling}


@pytest.mark.torch
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_is_that_of_transformers(name):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    kind, settings = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **settings},
    )
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 2, 100, 16), np.float32))
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(100)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    scaling = CLASSES[kind](**settings) if kind in CLASSES else None
    actual = mqa_jax.Rope(theta=500.0, scaling=scaling)(jnp.asarray(x.numpy()).swapaxes(1, 2), jnp.arange(100))
    np.testing.assert_allclose(actual.swapaxes(1, 2), expected.numpy(), atol=2e-5)


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_frequencies_are_those_of_transformers(name):
    """Some pairs turn too slowly to be seen in 100 positions."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind, settings = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **settings},
    )
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    scaling = CLASSES[kind](**settings)
    np.testing.assert_allclose(mqa_jax.Rope(scaling=scaling).frequencies(128), frequencies.numpy(), rtol=1e-5)
    np.testing.assert_allclose(scaling.magnitude, magnitude, rtol=1e-6)


def test_slopes_of_a_power_of_two_are_a_geometric_series():
    np.testing.assert_allclose(mqa_jax.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(mqa_jax.alibi_slopes(6), np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 0.5, 2.0**-3]))
