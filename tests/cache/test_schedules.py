"""Every cache, under any schedule of chunks, steps, resets and reorderings."""

import functools
from typing import Any

import hypothesis
import jax.numpy as jnp
import numpy as np
import pytest
from caches import close, full_pass, make, new_cache, step
from hypothesis import strategies as st
from rings import EIGHT_BITS, LENGTH, WINDOW

import mqa_jax
from mqa_jax import quantization

pytestmark = pytest.mark.usefixtures("skin")
SKINS = "linen", "nnx, tree mode"  # of which graph mode differs in nothing that test_nnx.py does not compare


@pytest.mark.slow
@hypothesis.given(st.data(), st.sampled_from([None, *EIGHT_BITS]))
@hypothesis.settings(max_examples=15)
def test_any_schedule_of_chunks_steps_resets_and_reorderings(data, dtype):
    """A ring beside a static cache of the same dtype, and that beside the full pass over the tokens of each row.

    With `qk_gn` and features of size 1 in the root mean square, |q|_1 is at most H, so the bound of
    `mqa_jax.quantization` can be told without knowing the query.
    """
    settings: dict[str, Any] = dict(qk_gn=True, norm_type="rmsnorm", rope=mqa_jax.Rope(), output_projection=False)
    static, params = make(cache_dtype=dtype, local_window_size=WINDOW, **settings)
    ring = static.clone(cache_layout="ring")
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    caches = [new_cache(module, max_length=LENGTH) for module in (static, ring)]
    texts = [np.zeros((0, 24), np.float32)] * 3
    for _ in range(data.draw(st.integers(2, 8))):
        action = data.draw(st.sampled_from(["tokens", "tokens", "tokens", "reset", "reorder"]))
        if action == "reset":
            rows = rng.random(3) < 0.5
            caches = [mqa_jax.reset_cache(cache, rows) for cache in caches]
            texts = [text[:0] if reset else text for text, reset in zip(texts, rows)]
        elif action == "reorder":
            order = rng.integers(0, 3, 3)
            caches = [mqa_jax.reorder_cache(cache, order) for cache in caches]
            texts = [texts[row] for row in order]
        else:
            length = data.draw(st.sampled_from([1, 4, 20]))
            lengths = np.minimum(rng.integers(0, length + 1, 3), [LENGTH - len(text) for text in texts])
            new = rng.standard_normal((3, length, 24)).astype(np.float32)
            call = functools.partial(step, params=params, x=jnp.asarray(new), seq_lengths=jnp.asarray(lengths))
            results = [call(module, cache=cache) for module, cache in zip((static, ring), caches)]
            (expected, _), (out, _) = results
            caches = [cache for _, cache in results]
            texts = [np.concatenate([text, x[:count]]) for text, x, count in zip(texts, new, lengths)]
            for row, count in enumerate(lengths):
                close(out[row, :count], expected[row, :count])
                allowed = 2e-5 + (0 if dtype is None else bound(caches[0], row, len(texts[row]), dtype))
                assert (
                    np.abs(expected[row, :count] - full_rows(static, params, texts[row], count)).max(initial=0)
                    < allowed
                )
    for cache, index in zip(caches, ("cache_index", "ring_index")):
        np.testing.assert_array_equal(cache[index], [len(text) for text in texts])


def full_rows(module, params, text, count):
    """The last `count` rows of the full pass over a text."""
    padded = np.zeros((1, LENGTH, 24), np.float32)
    padded[0, : len(text)] = text
    return full_pass(module, params, padded)[0, len(text) - count : len(text)]


def bound(cache, row, length, dtype) -> float:
    """Of `mqa_jax.quantization`, for all queries of a row, with H = 4."""
    cut = {name: x[row, :length] for name, x in cache.items() if x.ndim > 1}
    if not length:
        return 0.0
    delta = 4**-0.5 * 4 * quantization.rounding_error(dtype, cut["cached_key_scale"]).max()
    error = quantization.rounding_error(dtype, cut["cached_value_scale"]).max()
    values = mqa_jax.dequantize(cut["cached_value"], cut["cached_value_scale"])
    return float(jnp.tanh(delta / 2) * (values.max() - values.min() + 2 * error) + error)
