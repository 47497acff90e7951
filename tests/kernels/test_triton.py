"""The Triton kernels in interpret mode: all dtypes, every gradient, and what they touch.

Options: `test_every_pair_of_options`.
"""

import functools
import itertools
import re
import warnings
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from cuda_programs import kernels_in, lowered_for_cuda
from jax import export
from jax.ad_checkpoint import checkpoint_policies
from strict_gpu import strict_gpu

import mqa_jax
from benchmarks import gpu_compile
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import gpu, primitives
from mqa_jax.kernels.triton import decode, tile_config
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.kernels.triton.program import Program
from mqa_jax.kernels.triton.tile_config import TileConfig

pytestmark = pytest.mark.usefixtures("kernels")


def use_tiles(monkeypatch, **tiles: TileConfig) -> None:
    """These tiles instead of the table's, by direction."""
    monkeypatch.setattr(tile_config, "choose", lambda direction, inputs, rows=None: tiles[direction])


small = functools.partial(TileConfig, warps=4, stages=2)
SMALL = dict(
    forward=small(16, 32, defer_values=True),
    dq=small(16, 16),
    dkv=small(32, 16, features=16),
    dscore=small(16, 32),
    decode=small(16, 16),
)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("dtype", "sizes"), problems.FOR_PRECISION_IN_DTYPES, ids=str)
def test_precision(dtype, sizes):
    """With the tiles of the table, at most twice the error of a plain computation in the same dtype."""
    problem = oracle.random_problem(np.random.default_rng(0), **sizes).astype(dtype)
    plain, reference = oracle.plain_results(problem), oracle.results(problem.astype(jnp.float32), "reference")
    oracle.judge(oracle.results(problem, "kernels"), plain, reference)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("dtype", "bits", "sizes"), problems.FOR_PRECISION_IN_8_BITS, ids=str)
def test_precision_of_8_bits(dtype, bits, sizes):
    oracle.judge_8_bits(oracle.random_problem(np.random.default_rng(0), **sizes), dtype, bits, "kernels")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("features", "value_features"), [(96, 96), (192, 128), (8, 256), (256, 256)])
def test_head_sizes_in_pieces(monkeypatch, features, value_features):
    """192 = 128 + 64, 96 = 64 + 32; and cut smaller, as full float32 products want them."""
    pieces = dict(SMALL, forward=small(16, 32, features=32), dq=small(16, 16, features=128))
    use_tiles(monkeypatch, **pieces)
    sizes: Any = dict(batch=(1,), rows=21, columns=37, heads=2, kv_heads=1, is_causal=True)
    rng = np.random.default_rng(0)
    problem = oracle.random_problem(rng, features=features, value_features=value_features, **sizes)
    oracle.judge_float32(oracle.results(problem, "kernels"), oracle.results(problem, "reference"))


@pytest.mark.parametrize(
    ("dtype", "precision", "products"),
    [
        (jnp.float32, None, "HIGHEST"),
        (jnp.float32, ("highest", "highest"), "HIGHEST"),
        (jnp.float32, "tensorfloat32", "HIGH"),
        (jnp.float32, "TF32_TF32_F32_X3", "TF32_TF32_F32_X3"),
        (jnp.bfloat16, "highest", "DEFAULT"),
        (jnp.bfloat16, "BF16_BF16_F32", "DEFAULT"),
    ],
)
def test_products_are_as_precise_as_asked(dtype, precision, products):
    """Triton takes HIGH for tf32, which float32 gets only where the caller says so (`triton.precision`)."""
    array = jnp.ones((1, 4, 1, 8), dtype)
    inputs = inputs_of(array, array, array, precision=precision)
    program = str(jax.make_jaxpr(functools.partial(triton.forward, interpret=True))(inputs))
    assert set(re.findall(r"precision=\(?(?:Precision\.|DotAlgorithmPreset\.)?(\w+)", program)) == {products}


def test_what_runs_here_are_the_kernels():
    problem = oracle.random_problem(np.random.default_rng(0), rows=5, columns=7, heads=2, kv_heads=1, features=8)
    program = jax.jit(oracle.program(problem, "kernels")).lower(problem.arrays).as_text(debug_info=True)
    assert sorted(set(re.findall(r'"(mqa_[a-z]+)/pallas_call"', program))) == ["mqa_decode", "mqa_dkv", "mqa_dq"]


def everything(batch: int = 2, rows: int = 37, columns: int = 53, heads: int = 4) -> dict[str, Any]:
    """All options at once."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return dict(
        is_causal=True,
        query_offset=jnp.asarray(rng.integers(-5, 20, batch), jnp.int32),
        local_window_size=(30, 3),
        query_seq_lengths=jnp.asarray([rows, max(1, rows - 9)] * batch, jnp.int32)[:batch],
        key_value_seq_lengths=jnp.asarray([columns - 20, columns] * batch, jnp.int32)[:batch],
        query_segment_ids=jnp.sort(jnp.asarray(rng.integers(0, 3, (batch, rows)), jnp.int32)),
        key_value_segment_ids=jnp.sort(jnp.asarray(rng.integers(0, 3, (batch, columns)), jnp.int32)),
        mask=normal(1, heads, 1, columns) > -1,
        bias=normal(batch, 1, rows, columns),
        alibi_slopes=normal(heads) / 8,
        sinks=normal(heads),
        logits_soft_cap=2.0,
        dropout_rate=0.2,
        dropout_rng=jax.random.key(0),
    )


def test_all_options_at_once_and_the_same_bits_twice(monkeypatch):
    use_tiles(monkeypatch, **SMALL)
    problem = oracle.random_problem(
        np.random.default_rng(0), rows=37, columns=53, heads=4, kv_heads=1, features=24, **everything()
    )
    first, second = oracle.results(problem, "kernels"), oracle.results(problem, "kernels")
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)
    oracle.judge_float32(first, oracle.results(problem, "reference"))


def test_dropout_drops_the_same_as_xla(monkeypatch):
    """With values that are unit vectors the output is the weights: their zeros are the dropped ones."""
    use_tiles(monkeypatch, **SMALL)
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.standard_normal((2, 40, heads, 16)), jnp.float32) for heads in (4, 2))
    value = jnp.broadcast_to(jnp.eye(40)[None, :, None], (2, 40, 2, 40))
    options: Any = dict(dropout_rate=0.3, dropout_rng=jax.random.key(3))
    weights = [
        mqa_jax.dot_product_attention(query, key, value, implementation=i, **options) for i in ("kernels", "xla")
    ]
    np.testing.assert_array_equal(weights[0] == 0, weights[1] == 0)
    assert 0.25 < (weights[0] == 0).mean() < 0.35


# -- what the kernels touch -------------------------------------------------------------------------------------------


TOUCHING: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True),
    "everything": everything(1, 19, 35, 2),
    "bias of keys": dict(bias=jnp.zeros((1, 2, 1, 35)), alibi_slopes=jnp.ones(2)),
    "bias of queries": dict(bias=jnp.zeros((1, 1, 19, 1)), is_causal=True),
    "empty rows": dict(is_causal=True, query_offset=-17, mask=jnp.zeros((1, 1, 19, 1), bool)),
}


@pytest.mark.sampled(3)
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


@pytest.mark.sampled(3)
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


@pytest.mark.sampled(5)
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


def shapes_in(jaxpr: Any) -> set[tuple[int, ...]]:
    """Of all that a program computes, the insides of kernels left out."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(variable.aval.shape) for variable in equation.outvars}
        if equation.primitive.name.startswith("mqa_attention"):
            compute = functools.partial(equation.primitive.impl, **equation.params)
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


# -- transformations --------------------------------------------------------------------------------------------------


PROBLEM = oracle.random_problem(np.random.default_rng(0), rows=21, columns=17, heads=4, kv_heads=2, features=8)
attend = functools.partial(mqa_jax.dot_product_attention, is_causal=True, query_offset=3)
loss = lambda arrays, implementation, wrap=lambda f: f: jnp.sum(
    wrap(lambda arrays: attend(**arrays, implementation=implementation))(arrays) ** 2
)
close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, atol=1e-5))


def test_vmap_and_scan():
    """Of the gradient, over rows; and in a scan, as layers are."""
    gradient = lambda implementation: jax.grad(lambda arrays: loss(arrays, implementation))
    close(jax.vmap(gradient("kernels"))(PROBLEM.arrays), gradient("xla")(PROBLEM.arrays))

    def layers(query, implementation):
        layer = lambda query, _: (
            attend(query, PROBLEM.arrays["key"], PROBLEM.arrays["value"], implementation=implementation),
            None,
        )
        return jax.lax.scan(layer, query, length=2)[0].sum()

    close(*(jax.grad(layers)(PROBLEM.arrays["query"], name) for name in ("kernels", "xla")))


def test_donation_and_compiling_ahead_of_time():
    query, key, value = PROBLEM.arrays.values()
    step = jax.jit(lambda query: attend(query, key, value, implementation="kernels"), donate_argnums=0)
    donated, expected = query + 0, attend(query, key, value, implementation="xla")
    close(step.lower(donated).compile()(donated), expected)
    assert donated.is_deleted()


@pytest.mark.parametrize(
    ("policy", "forward_kernels"),
    [(None, 2), (checkpoint_policies.save_only_these_names(primitives.OUT_NAME, primitives.LOG_SUM_EXP_NAME), 1)],
)
def test_remat_can_save_what_the_backward_pass_needs(policy, forward_kernels):
    """Without a policy the forward kernel runs twice; with the two names saved, once."""
    remat = functools.partial(jax.checkpoint, policy=policy)
    text = lowered_for_cuda(jax.grad(lambda arrays: loss(arrays, "triton", remat)), PROBLEM.arrays).as_text()
    assert kernels_in(text) == ["mqa_dkv", "mqa_dq", *["mqa_forward"] * forward_kernels]
    gradient = jax.grad(lambda arrays: loss(arrays, "kernels", remat))
    close(gradient(PROBLEM.arrays), jax.grad(lambda arrays: loss(arrays, "xla"))(PROBLEM.arrays))


# -- on CUDA, without a GPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_lowering_for_cuda_chooses_the_kernels(implementation):
    gradient = jax.grad(lambda arrays: loss(arrays, implementation))
    assert kernels_in(lowered_for_cuda(gradient, PROBLEM.arrays).as_text()) == ["mqa_dkv", "mqa_dq", "mqa_forward"]


def test_lowering_for_cuda_falls_back_where_the_kernels_cannot():
    """A head size beyond theirs: `None` takes plain XLA."""
    query = jnp.ones((1, 5, 2, 264))
    text = lowered_for_cuda(lambda x: attend(x, x, x), query).as_text()
    assert kernels_in(text) == []
    assert "stablehlo.while" in text


def test_export_for_cuda():
    """The kernels are no stable part of StableHLO, so the caller has to say that this is known."""
    check = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    target = gpu_compile.TARGETS["h100"]
    with gpu.assuming("sm90"), gpu_compile.lowering_for(target), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of flatbuffers, in `serialize`
        exported = export.export(jax.jit(attend), platforms=["cuda"], disabled_checks=[check])(**PROBLEM.arrays)
        again = export.deserialize(exported.serialize())
    assert kernels_in(str(again.mlir_module())) == ["mqa_forward"]
