"""Ring buffers: what is cached is what was to be cached, and attention to it is exact."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import RNG, X, close, eager_step, full_pass, make, new_cache, step
from jax.experimental import checkify
from rings import LENGTH, OPTIONS, PAIRS, RING, SCHEDULE, SLOTS, TEXT, WINDOW, cached, rows_of

import mqa_jax

pytestmark = pytest.mark.usefixtures("skin")
SKINS = ("linen",)  # test_nnx.py compares the bits of NNX with it; test_schedules.py runs with both


@pytest.mark.parametrize("name", OPTIONS)
def test_a_ring_computes_what_the_full_pass_does(name):
    settings = {**RING, **OPTIONS[name]}
    module, params = make(**settings)
    out, cache = cached(module, params)
    if not settings.get("causal", True):  # what comes later changes what was before, so each chunk is the end of a text
        chunks = np.cumsum(SCHEDULE)
        full = [full_pass(module, params, TEXT[:, :stop])[:, start:] for start, stop in zip([0, *chunks], chunks)]
        return close(out, jnp.concatenate(full, 1))
    close(out, full_pass(module, params, TEXT[:, : sum(SCHEDULE)]))
    np.testing.assert_array_equal(cache["ring_index"], sum(SCHEDULE))


@pytest.mark.parametrize("name", PAIRS)
def test_masks_and_biases_of_a_ring_are_by_position(name):
    module, params = make(**RING)
    schedule = (3, 20, 2, 1)
    out, _ = cached(module, params, schedule, arguments=functools.partial(rows_of, name))
    length = sum(schedule)
    cut = {key: x[..., :length] if x.shape[-1] > 1 else x for key, x in rows_of(name, 0, length).items()}
    close(out, full_pass(module, params, TEXT[:, :length], **cut))


TABLES: dict[str, Any] = {
    "mask": dict(mask=jnp.tril(jnp.ones((1, LENGTH, LENGTH), bool))),
    "mask of each row": dict(mask=PAIRS["mask"]),
    "bias": dict(bias=PAIRS["bias"]),
    "bias of queries": dict(bias=PAIRS["bias of queries"]),
    "both": dict(bias=PAIRS["bias"], mask=PAIRS["mask"]),
}


@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("name", TABLES)
def test_one_table_of_all_pairs_serves_every_call(name, layout):
    """Rows of the batch at different positions, in steps, chunks, and more than a ring takes at once."""
    module, params = make(cache_layout=layout, local_window_size=WINDOW, causal=name != "mask")
    lengths = np.array([7, 3, 0])
    cache = new_cache(module, max_length=LENGTH - 2)  # the table may be longer than the cache
    first, cache = step(module, params, cache, TEXT[:, :7], seq_lengths=jnp.asarray(lengths), **TABLES[name])
    following = jnp.stack([TEXT[row, n : n + 32] for row, n in enumerate(lengths)])
    out, _ = cached(module, params, (1, 5, 1, 23, 2), cache, following, lambda start, stop: TABLES[name])
    full = full_pass(module, params, TEXT, **TABLES[name])
    for row, n in enumerate(lengths):
        close(first[row, :n], full[row, :n])
        close(out[row], full[row, n : n + 32])


@pytest.mark.parametrize("layout", ["static", "ring"])
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_a_table_that_ends_before_the_last_token_is_nan_under_jit(name, layout):
    module, params = make(cache_layout=layout, local_window_size=WINDOW)
    table = {name: TABLES[name][name][..., :6, :]}
    _, cache = step(module, params, new_cache(module, max_length=LENGTH), TEXT[:, :4], seq_lengths=jnp.array([4, 2, 4]))
    out, cache = step(module, params, cache, TEXT[:, 4:7], **table)
    np.testing.assert_array_equal(jnp.isnan(out).all((1, 2)), [True, False, True])
    assert not jnp.isnan(step(module, params, cache, TEXT[:, 7:8])[0]).any()  # the cache itself took the tokens
    error, _ = jax.jit(checkify.checkify(functools.partial(eager_step, module)))(params, cache, TEXT[:, 7:8], **table)
    assert "rows=6" in error.get()


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_hundreds_of_steps_past_the_end_of_a_ring(dtype):
    """One token at a time; in 8 bits beside a static cache."""
    module, params = make(rope=mqa_jax.Rope(theta=100.0), cache_dtype=dtype, **RING)
    static = module.clone(cache_layout="static")
    text = jax.random.normal(RNG, (2, 400, 24))

    @functools.partial(jax.jit, static_argnums=0)
    def scanned(module, cache):
        def turn(cache, token):
            out, cache = eager_step(module, params, cache, token[:, None])
            return cache, out[:, 0]

        return jax.lax.scan(turn, cache, text.swapaxes(0, 1))[1].swapaxes(0, 1)

    out = scanned(module, new_cache(module, 2, max_length=1))
    expected = full_pass(module, params, text) if dtype is None else scanned(static, new_cache(static, 2, 400))
    close(out, expected, atol=5e-5)


def test_a_ring_takes_the_bytes_of_its_window():
    bytes_of = lambda window, length: mqa_jax.cache_bytes(
        new_cache(make(cache_layout="ring", local_window_size=window)[0], max_length=length)
    )
    assert bytes_of(6, 1) == bytes_of((6, 0), 10**9) == 3 * SLOTS * 2 * 4 * 4 * 2
    assert bytes_of(4095, 1) == 3 * (4095 + 16) * 2 * 4 * 4 * 2


def test_a_ring_is_read_in_place():
    """For a step nothing of its size is copied."""
    module, params = make(cache_layout="ring", local_window_size=(8191, 0))
    cache = new_cache(module)
    compiled = jax.jit(functools.partial(eager_step, module), donate_argnums=1).lower(params, cache, X[:, :1]).compile()
    pointer = cache["cached_key"].unsafe_buffer_pointer()
    _, changed = compiled(params, cache, X[:, :1])
    assert changed["cached_key"].unsafe_buffer_pointer() == pointer
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < changed["cached_key"].nbytes / 2


def test_a_mask_that_ends_before_the_last_token_is_refused():
    module, params = make(**RING)
    _, cache = cached(module, params, (20, 10))
    mask = jnp.ones((3, 31), bool)
    with pytest.raises(ValueError, match=r"column for each position.*positions=\[32 32 32\].*columns=31"):
        eager_step(module, params, cache, TEXT[:, 30:32], mask=mask)
    out, cache = step(module, params, cache, TEXT[:, 30:32], mask=mask, seq_lengths=jnp.array([1, 2, 1]))
    assert jnp.isnan(out[1]).all()
    assert not jnp.isnan(out[::2, :1]).any()
    out, _ = step(module, params, cache, TEXT[:, 32:33])  # the ring itself took the token
    close(out[1, 0], full_pass(module, params, TEXT[:, :33])[1, 32])
    checked = jax.jit(checkify.checkify(functools.partial(eager_step, module)))
    error, _ = checked(params, cache, TEXT[:, 30:32], mask=mask)
    assert "columns=31" in error.get()


def test_a_ring_is_never_full():
    module, params = make(**RING)
    _, cache = cached(module, params)
    mqa_jax.check_cache({"layer": cache})
