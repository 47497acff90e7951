"""The Triton kernels in interpret mode: all dtypes, every gradient.

Options: `test_every_pair_of_options`.
"""

import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import problems
import pytest
from cuda_programs import kernels_in, lowered_for_cuda
from forced_tiles import SMALL, small, use_tiles
from jax import export
from jax.ad_checkpoint import checkpoint_policies

import mqa_jax
from benchmarks import gpu_compile
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import gpu, primitives
from mqa_jax.kernels.triton import implementation as triton

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize(("dtype", "sizes"), problems.FOR_PRECISION_IN_DTYPES, ids=str)
def test_precision(dtype, sizes):
    """With the tiles of the table, at most twice the error of a plain computation in the same dtype."""
    problem = oracle.random_problem(np.random.default_rng(0), **sizes).astype(dtype)
    plain, reference = oracle.plain_results(problem), oracle.results(problem.astype(jnp.float32), "reference")
    oracle.judge(oracle.results(problem, "kernels"), plain, reference)


@pytest.mark.parametrize(("dtype", "bits", "sizes"), problems.FOR_PRECISION_IN_8_BITS, ids=str)
def test_precision_of_8_bits(dtype, bits, sizes):
    oracle.judge_8_bits(oracle.random_problem(np.random.default_rng(0), **sizes), dtype, bits, "kernels")


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
    run = oracle.program(problem, "kernels")
    first, second = run(problem.arrays), run(problem.arrays)
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


# -- transformations ---------------------------------------------------------------------------------------------------
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


# -- on CUDA, without a GPU --------------------------------------------------------------------------------------------


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
