"""Passes over parts of the keys, whose results are not rounded before they are summed."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mqa_jax.attention import inputs_of
from mqa_jax.kernels import online_softmax
from mqa_jax.kernels.online_softmax import State
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.kernels.xla import implementation as xla
from mqa_jax.sharded.chunks import Order, pair

PASSES = {
    "xla": (xla.forward, xla.backward),
    "triton": tuple(functools.partial(one, interpret=True) for one in (triton.forward, triton.backward)),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(("rows", "devices"), [(24, 2), (3, 4)])
def test_parts_are_not_rounded(name, rows, devices):
    """In bfloat16, against the reference: as few errors as on one device, with all parts of the keys apart."""
    forward, backward = PASSES[name]
    columns = 24
    rng = np.random.default_rng(0)
    problem = oracle.random_problem(rng, batch=(1,), rows=rows, columns=columns, heads=4, kv_heads=2, features=16)
    problem = replace(problem, options=dict(is_causal=True, query_offset=columns - rows)).astype(jnp.bfloat16)
    inputs = inputs_of(**problem.arrays, **problem.options)
    queries = Order("contiguous", 1).chunks(jnp.int32(0), rows)[0]
    parts = []
    for device in range(devices):
        (keys,) = Order("contiguous", devices).chunks(jnp.int32(device), columns // devices)
        own = slice(device * keys.length, (device + 1) * keys.length)
        parts.append(pair(inputs, queries, keys, inputs.operands.key[:, own], inputs.operands.value[:, own]))
    forward, backward = jax.jit(forward), jax.jit(backward)
    states = [State.of(*forward(part)) for part in parts]
    assert all(state.weighted.dtype == jnp.float32 for state in states)
    out, normalizer = online_softmax.finish(functools.reduce(online_softmax.merge, states))
    normalizer = jax.tree.map(lambda x: x[..., 0], normalizer)
    d_out = problem.cotangents[0].astype(jnp.bfloat16)
    given = out.astype(jnp.bfloat16), normalizer, d_out, problem.cotangents[1]
    gradients = [backward(part, *given) for part in parts]
    join = lambda which: jnp.concatenate([getattr(x, which) for x in gradients], axis=1)
    found = {
        "out": out,
        "d_query": sum(x.query for x in gradients),
        "d_key": join("key"),
        "d_value": join("value"),
    }
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.float32)}
    found = {which: x.astype(jnp.bfloat16) for which, x in found.items()}
    found["log_sum_exp"] = normalizer.log_sum_exp
    exact = replace(problem, cotangents=(d_out.astype(jnp.float32), problem.cotangents[1]))
    oracle.judge(found, oracle.plain_results(exact), oracle.results(exact.astype(jnp.float32), "reference"))
