"""Runs in a process of its own with 8 CPU devices: decoding with a cache that is cut over the sequence."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from collectives import collectives
from jax.sharding import PartitionSpec as P
from sequences import B, H, K, N, T, mesh_of, normal, numbers, problem

import mqa_jax


def steps(devices=8, tokens=1, dtype=jnp.float32):
    """Steps of decoding with a cache that is cut over devices, against attention to all of it on one."""
    mesh, slots = mesh_of(devices), T
    cache = jnp.zeros((B, slots, K, H), dtype), jnp.zeros((B, slots, K, H), dtype)
    lengths = numbers(0, slots - 3 * tokens)
    options: Any = dict(sinks=normal(N), alibi_slopes=normal(N) / 8)

    def step(query, key, value, lengths, cache):
        cache = tuple(
            mqa_jax.append_to_part(part, x, lengths, axis_name="s") for part, x in zip(cache, (key, value), strict=True)
        )
        limits: Any = dict(is_causal=True, query_offset=lengths, key_value_seq_lengths=lengths + tokens)
        attend: Any = functools.partial(mqa_jax.decode_attention, axis_name="s", implementation="xla")
        return attend(query, *cache, **limits, **options, local_window_size=(11, 0), return_residual=True), cache

    cut = P(None, "s")
    run = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P(), P(), (cut, cut)), out_specs=(P(), (cut, cut)))
    )
    whole: Any = cache
    for _ in range(3):
        query, key, value = (normal(B, tokens, heads, H).astype(dtype) for heads in (N, K, K))
        rows, columns = jnp.arange(B)[:, None], lengths[:, None] + jnp.arange(tokens)
        whole = tuple(x.at[rows, columns].set(new) for x, new in zip(whole, (key, value)))
        found, cache = run(query, key, value, lengths, cache)
        limits = dict(is_causal=True, query_offset=lengths, key_value_seq_lengths=lengths + tokens)
        one = oracle.Problem(
            dict(query=query, key=whole[0], value=whole[1], **options), dict(limits, local_window_size=(11, 0))
        )
        actual = dict(zip(("out", "log_sum_exp"), found))
        oracle.judge(actual, oracle.plain_outputs(one), oracle.outputs(one, "reference"))
        jax.tree.map(np.testing.assert_array_equal, cache, whole)
        lengths = lengths + tokens
    program = run.lower(query, key, value, lengths, cache).compile()
    row = B * tokens * N * 4
    assert collectives(program) == {"all-reduce": sorted([row, row * (H + 1)])}
    _, cache = run(query, key, value, numbers(slots, 0), cache)  # beyond the end, where nobody can raise
    assert np.isnan(np.asarray(cache[0], np.float32)[0, -1]).all()
    assert not np.isnan(np.asarray(cache[0], np.float32)[1]).any()


def beyond_the_end():
    """Of positions near 2**31 the following ones wrap: nobody can raise, so NaN says that the tokens do not fit."""
    count, cache, tokens = 3, jnp.zeros((4, 16)), jnp.ones((4, 3))
    cut = P(None, "s")
    append = functools.partial(mqa_jax.append_to_part, axis_name="s")
    run = jax.shard_map(append, mesh=mesh_of(8), in_specs=(cut, P(), P()), out_specs=cut)
    positions = numbers(16 - count, 16 - count + 1, 2**31 - count, 2**31 - 1)
    written = np.asarray(jax.jit(run)(cache, tokens, positions))
    np.testing.assert_array_equal(written[0], [0] * 13 + [1] * count)
    assert not (written[1:] == 1).any()
    assert np.isnan(written[1:, -1]).all()


def gradients():
    """They are summed over devices where the operand is shared."""
    one, plain, right = problem("sinks")
    mesh, cut = mesh_of(8), P(None, "s")
    specs = {name: cut if name in ("key", "value") else P() for name in one.arrays}

    def part(arrays: Any, lengths):
        options: Any = dict(is_causal=True, query_seq_lengths=lengths, axis_name="s", implementation="xla")
        return mqa_jax.decode_attention(**arrays, **options, return_residual=True)

    for check_vma in (True, False):
        run = jax.shard_map(part, mesh=mesh, in_specs=(specs, P()), out_specs=(P(), P()), check_vma=check_vma)
        attend = lambda arrays, options, run=run: run(arrays, options["query_seq_lengths"])
        oracle.judge(oracle.compiled(one, attend)(one), plain, right)
