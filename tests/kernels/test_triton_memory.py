"""What the Triton kernels read and write: what exists, and every entry of a result once."""

import functools
import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from forced_tiles import SMALL, use_tiles
from strict_gpu import strict_gpu
from test_triton import everything

import mqa_jax
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import mapped, primitives
from mqa_jax.kernels.triton import decode
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.kernels.triton.program import Program

pytestmark = pytest.mark.usefixtures("kernels")
TOUCHING: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True),
    "everything": everything(1, 19, 35, 2),
    "bias of keys": dict(bias=jnp.zeros((1, 2, 1, 35)), alibi_slopes=jnp.ones(2)),
    "bias of queries": dict(bias=jnp.zeros((1, 1, 19, 1)), is_causal=True),
    "empty rows": dict(is_causal=True, query_offset=-17, mask=jnp.zeros((1, 1, 19, 1), bool)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TOUCHING)
def test_every_entry_read_exists_and_every_entry_of_a_result_is_written_once(monkeypatch, name):
    """On a strict model of a GPU's memory, see `strict_gpu`; interpret mode would hide it."""
    use_tiles(monkeypatch, **SMALL)
    options = dict(TOUCHING[name])
    bias, mask = options.pop("bias", None), options.pop("mask", None)
    sizes: Any = dict(batch=(1,), rows=19, columns=35, heads=2, kv_heads=1, features=24, value_features=20)
    problem = oracle.random_problem(np.random.default_rng(0), **sizes)
    inputs = inputs_of(**problem.arrays, bias=bias, mask=mask, return_residual=True, **options)
    cotangents = problem.cotangents
    with jax.disable_jit():
        ran = strict_gpu(monkeypatch)
        out, normalizer = triton.forward(inputs, interpret=True)
        gradients = triton.backward(inputs, out, normalizer, *cotangents, interpret=True)
    score_terms = [x for x in (bias, options.get("alibi_slopes")) if x is not None]
    assert ran == ["mqa_forward", "mqa_dkv", "mqa_dq", *["mqa_dscore"] * len(score_terms)]
    monkeypatch.undo()
    expected, pull_back = jax.vjp(
        lambda operands: mqa_jax.reference.forward(replace(inputs, operands=operands)), inputs.operands
    )
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    assert expected[1] is not None
    empty = jnp.isneginf(expected[1])
    (expected_gradients,) = pull_back((cotangents[0], jnp.where(empty, 0.0, cotangents[1])))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), gradients, expected_gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "least_keys", "kernels"),
    [
        ("static", 8, ["mqa_decode", "mqa_merge"]),
        ("static", 64, ["mqa_decode"]),
        ("ring in 8 bits", 8, ["mqa_decode", "mqa_merge"]),
    ],
)
def test_a_decoding_step_touches_what_exists(cache, least_keys, kernels, monkeypatch):
    """Three queries of two groups of three heads, with all options, on a strict model of memory."""
    use_tiles(monkeypatch, **SMALL)
    monkeypatch.setattr(decode, "MIN_KEYS", least_keys)
    options = everything(2, 3, 35, 6)
    bias, mask = options.pop("bias"), options.pop("mask")
    sizes: Any = dict(batch=(2,), rows=3, columns=35, heads=6, kv_heads=2, features=24, value_features=20)
    problem = oracle.random_problem(np.random.default_rng(0), **sizes)
    if cache != "static":
        del options["key_value_seq_lengths"]
        problem = oracle.quantized(problem, "int8")
        lengths = jnp.array([50, 17], jnp.int32)
        options |= problem.options | dict(key_value_ring_lengths=lengths, query_offset=lengths - 3)
    inputs = inputs_of(**problem.arrays, bias=bias, mask=mask, return_residual=True, **options)
    with jax.disable_jit():
        ran = strict_gpu(monkeypatch)
        out, normalizer = triton.forward(inputs, interpret=True)
    assert ran == kernels
    monkeypatch.undo()
    expected: Any = mqa_jax.reference.forward(inputs)
    np.testing.assert_allclose(out, expected[0], atol=1e-5)
    np.testing.assert_allclose(normalizer.log_sum_exp, expected[1], atol=1e-5)


@pytest.mark.parametrize("cache", ["static", "ring in 8 bits"])
@pytest.mark.parametrize("shared", list(itertools.product((False, True), repeat=4)), ids=str)
def test_few_queries_with_pairs_shared_along_any_axes(shared, cache, monkeypatch):
    """Mask and bias `[#B, #N, #T, #S]`, of three queries of two groups of four heads, are read where they lie."""
    use_tiles(monkeypatch, **SMALL)
    monkeypatch.setattr(decode, "MIN_KEYS", 16)
    rng, pairs = np.random.default_rng(0), (2, 8, 3, 35)
    shapes = [[1 if one != other else n for one, n in zip(shared, pairs)] for other in (True, False)]
    mask, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    options: dict[str, Any] = dict(mask=mask > -0.8, bias=bias)
    problem = oracle.random_problem(rng, rows=3, columns=35, heads=8, kv_heads=2, features=16, **options)
    if cache != "static":
        problem = oracle.quantized(problem, "int8")
        lengths = jnp.array([50, 17], jnp.int32)
        problem = replace(problem, options=problem.options | dict(key_value_ring_lengths=lengths))
    oracle.judge_float32(oracle.outputs(problem, "kernels"), oracle.outputs(problem, "reference"))
    attend = lambda arrays: oracle.outputs(replace(problem, arrays=arrays), "kernels")
    computed = shapes_in(jax.make_jaxpr(attend)(problem.arrays).jaxpr)
    copies = [shape for shape in computed if shape[-1:] == (35,) and len(shape) == 4]
    assert set(copies) <= {tuple(shape) for shape in shapes}


def test_the_strict_memory_is_strict(monkeypatch):
    """A kernel that forgets to mask the tail is caught reading it."""
    use_tiles(monkeypatch, **SMALL)
    monkeypatch.setattr(Program, "ragged_rows", lambda program: False)
    problem = oracle.random_problem(
        np.random.default_rng(0), batch=(1,), rows=19, columns=32, heads=1, kv_heads=1, features=16
    )
    inputs = inputs_of(**problem.arrays)
    strict_gpu(monkeypatch)
    with jax.disable_jit(), pytest.raises(AssertionError, match=r"19 on axis 1 of \(1, 19, 1, 16\) is read"):
        triton.forward(inputs, interpret=True)


COMPUTED: dict[Any, Any] = {
    primitives.attention_p: primitives._forward,
    primitives.tangent_p: primitives._tangent,
    primitives.backward_p: primitives._backward,
}


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """Of all that a program computes, the insides of kernels left out."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(variable.aval.shape) for variable in equation.outvars}
        if equation.primitive.name.startswith("mqa_attention"):
            parameters = dict(equation.params)
            maps = parameters.pop("maps")
            compute = mapped.over(maps, functools.partial(COMPUTED[equation.primitive], **parameters))
            found |= shapes_in(jax.make_jaxpr(compute)(*(variable.aval for variable in equation.invars)).jaxpr)
        if equation.primitive.name != "pallas_call":
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                found |= shapes_in(inner) if hasattr(inner, "eqns") else set()
    return found


def test_nothing_has_query_heads_at_the_size_of_keys_and_nothing_all_pairs():
    """Forward and backward, with a bias that broadcasts: K, V, dK, dV and their partial sums have K heads."""
    rows, columns, heads = 131, 257, 6
    problem = oracle.random_problem(
        np.random.default_rng(0), batch=(1,), rows=rows, columns=columns, heads=heads, kv_heads=2, features=16,
        bias=jnp.zeros((1, 1, 1, columns)), alibi_slopes=jnp.ones(heads), is_causal=True,
    )  # fmt: skip
    compute = oracle.program(problem, "kernels")
    shapes = shapes_in(jax.make_jaxpr(compute)(problem.arrays).jaxpr)
    assert (1, columns, 2, 16) in shapes
    assert not [shape for shape in shapes if columns in shape and (rows in shape or heads in shape)]
