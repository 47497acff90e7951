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


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_rope_is_that_of_transformers(kind):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    settings = {
        "default": {},
        "linear": dict(factor=4.0),
        "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    }
    classes = {"linear": mqa_jax.LinearScaling, "llama3": mqa_jax.Llama3Scaling}
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 500.0, **settings[kind]},
    )
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 2, 100, 16), np.float32))
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(100)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    scaling = classes[kind](**settings[kind]) if kind in classes else None
    actual = mqa_jax.Rope(theta=500.0, scaling=scaling)(jnp.asarray(x.numpy()).swapaxes(1, 2), jnp.arange(100))
    np.testing.assert_allclose(actual.swapaxes(1, 2), expected.numpy(), atol=2e-5)


def test_slopes_of_a_power_of_two_are_a_geometric_series():
    np.testing.assert_allclose(mqa_jax.alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(mqa_jax.alibi_slopes(6), np.array([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 0.5, 2.0**-3]))
