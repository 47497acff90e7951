"""What the Triton kernels cannot compute is refused in time, with the reason, and `None` goes on to xla."""

import contextlib
import functools
import subprocess
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cuda_programs import kernels_in, lowered_for_cuda
from jax.experimental import pallas
from jax.experimental.pallas import triton as pallas_triton
from own_process import ROOT

import mqa_jax
from mqa_jax.attention import inputs_of
from mqa_jax.kernels.triton import implementation as triton
from mqa_jax.kernels.triton import lowering, precision

Precision, Preset = jax.lax.Precision, jax.lax.DotAlgorithmPreset
DTYPES = ("float32", "bfloat16", "float16")


def problem(dtype: str, **options: Any):
    array = jnp.ones((1, 4, 1, 8), dtype)
    return inputs_of(array, array, array, **options)


# -- precision --------------------------------------------------------------------------------------------------------

FULL, TF32, TF32_3X, EXACT = "float32", "tf32", "three times tf32", "exact"
PRODUCTS: dict[Any, tuple[str | None, ...]] = {  # by DTYPES; None is refused, and so is what is not here
    Precision.DEFAULT: (TF32, EXACT, EXACT),
    Precision.HIGH: (TF32, EXACT, EXACT),
    Precision.HIGHEST: (FULL, EXACT, EXACT),
    Preset.DEFAULT: (FULL, EXACT, EXACT),
    Preset.F32_F32_F32: (FULL, EXACT, EXACT),
    Preset.TF32_TF32_F32: (TF32, EXACT, EXACT),
    Preset.TF32_TF32_F32_X3: (TF32_3X, EXACT, EXACT),
    Preset.BF16_BF16_F32: (None, EXACT, None),
    Preset.BF16_BF16_F32_X3: (None, EXACT, None),
    Preset.BF16_BF16_F32_X6: (None, EXACT, None),
    Preset.BF16_BF16_F32_X9: (None, EXACT, None),
    Preset.F16_F16_F32: (None, None, EXACT),
}
NAMES = {
    FULL: precision.FULL,
    TF32: precision.TF32,
    TF32_3X: precision.TF32_3X,
    EXACT: precision.EXACT,
}
EVERY = [(wish, dtype) for wish in (*Precision, *Preset) for dtype in DTYPES]


@pytest.mark.parametrize(("wish", "dtype"), EVERY, ids=str)
def test_every_precision_has_a_meaning_or_is_refused(wish, dtype):
    """Given as itself, by its name, for each side of a product, or as what JAX is configured for (not "DEFAULT")."""
    expected = PRODUCTS.get(wish, (None,) * len(DTYPES))[DTYPES.index(dtype)]
    named = wish.name if wish in Preset else wish.name.lower()
    pairs = [] if wish in Preset else [(wish, wish), (named, named)]
    for given in (wish, named, *pairs):
        inputs = problem(dtype, precision=given)
        reason = triton.cannot(inputs)
        if expected is None:
            assert reason is not None
            assert f"(precision={wish.name})" in reason
        else:
            assert reason is None
            assert precision.products_of(inputs) == NAMES[expected]
    with jax.default_matmul_precision(named) if wish is not Preset.DEFAULT else contextlib.nullcontext():
        reason = triton.cannot(problem(dtype))
        assert (reason is None) == (expected is not None)
        assert reason is None or f"(precision={wish.name})" in reason


def test_without_a_wish_products_are_full():
    assert [precision.products_of(problem(dtype)) for dtype in DTYPES] == [
        precision.FULL,
        precision.EXACT,
        precision.EXACT,
    ]


@pytest.mark.parametrize(
    ("dtype", "pair", "expected"),
    [
        ("float32", ("high", "default"), TF32),
        ("float32", ("highest", "high"), None),
        ("bfloat16", ("highest", "default"), EXACT),
    ],
)
def test_two_wishes_have_to_mean_the_same(dtype, pair, expected):
    inputs = problem(dtype, precision=pair)
    assert triton.cannot(inputs) is None if expected else "(precision=HIGHEST, HIGH)" in str(triton.cannot(inputs))
    assert expected is None or precision.products_of(inputs) == NAMES[expected]


def test_an_algorithm_in_its_parts_is_refused():
    algorithm = jax.lax.DotAlgorithm("float32", "float32", "float32")
    assert "with float32 sums only (precision=DotAlgorithm" in str(
        triton.cannot(problem("float32", precision=algorithm))
    )


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "BF16_BF16_F32"), ("float16", Preset.F16_F16_F32)])
def test_none_takes_the_kernels_for_a_preset_that_means_them(dtype, precision):
    arrays = [jnp.ones((1, 20, heads, 16), dtype) for heads in (4, 2, 2)]
    attend = lambda *arrays: mqa_jax.dot_product_attention(*arrays, precision=precision)
    gradient = jax.grad(lambda *arrays: attend(*arrays).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    with jax.default_matmul_precision("highest"):  # which the preset overrules
        assert kernels_in(lowered_for_cuda(gradient, *arrays).as_text()) == ["mqa_dkv", "mqa_dq", "mqa_forward"]


def test_none_goes_on_to_xla_for_sums_in_16_bits():
    array = jnp.ones((1, 20, 2, 16), jnp.bfloat16)
    attend = functools.partial(mqa_jax.dot_product_attention, precision="BF16_BF16_BF16")
    with pytest.raises(NotImplementedError, match=r"unrounded bfloat16 .*\(precision=BF16_BF16_BF16\); use impl"):
        attend(array, array, array, implementation="triton")
    assert kernels_in(lowered_for_cuda(attend, array, array, array).as_text()) == []


# -- dtypes of what is added ------------------------------------------------------------------------------------------

SMALL_FLOATS = [
    jnp.dtype(getattr(jnp, name)).name for name in dir(jnp) if name.startswith(("float4_", "float6_", "float8_"))
]

IS_COMPUTED = lambda name: not name.startswith("float6_")  # of these XLA has no numbers


@pytest.mark.parametrize("dtype", SMALL_FLOATS)
def test_a_small_bias_is_refused_and_none_goes_on_to_xla(dtype):
    """JAX ends the process where it compiles some of these for some GPUs."""
    query = jax.ShapeDtypeStruct((1, 20, 2, 16), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 2, 20, 20), dtype)
    attend = lambda x, bias, name: mqa_jax.dot_product_attention(x, x, x, bias, implementation=name)
    with pytest.raises(NotImplementedError, match=rf"a bias of float32, .*, float64 only \(bias.dtype={dtype}\)"):
        lowered_for_cuda(functools.partial(attend, name="triton"), query, bias)
    assert kernels_in(lowered_for_cuda(functools.partial(attend, name=None), query, bias).as_text()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", *filter(IS_COMPUTED, SMALL_FLOATS)])
@pytest.mark.usefixtures("kernels")
def test_slopes_and_sinks_of_any_dtype(dtype):
    """N numbers each: kernels read them in float32. Gradients come in the dtype given."""
    problem = oracle.random_problem(np.random.default_rng(0), rows=19, columns=21, heads=2, kv_heads=1, features=8)
    of_heads = dict(alibi_slopes=jnp.asarray([1.0, 0.5], dtype), sinks=jnp.asarray([2.0, 0.5], dtype))

    def outcome(implementation):
        attend = lambda of_heads: mqa_jax.dot_product_attention(
            **problem.arrays, **of_heads, implementation=implementation
        )
        out, pull_back = jax.vjp(attend, of_heads)
        return out, pull_back(jnp.ones_like(out))[0]

    (out, gradients), (expected, expected_gradients) = outcome("kernels"), outcome("reference")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for name, x in gradients.items():
        assert x.dtype == dtype
        if dtype == "float8_e8m0fnu":  # has no negative numbers
            continue
        rounding = float(jnp.finfo(dtype).eps) * np.abs(np.float32(expected_gradients[name])) + 1e-3
        assert (np.abs(np.float32(x) - np.float32(expected_gradients[name])) <= rounding).all(), name


# -- arrays of bytes of 2 to 4 GiB ------------------------------------------------------------------------------------

GIB = 1 << 30


def shaped(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def in_8_bits(rows: int, batch: int, keys: int):
    """Arrays of a call with a quantized cache, and the call."""
    cache = shaped(batch, keys, 8, 128, dtype=jnp.int8)
    scale = shaped(batch, keys, 8, dtype=jnp.float32)
    arrays = shaped(batch, rows, 8, 128), cache, cache, scale, scale
    call = lambda query, key, value, key_scale, value_scale, name: mqa_jax.dot_product_attention(
        query, key, value, key_scale=key_scale, value_scale=value_scale, implementation=name
    )
    return arrays, call


def mapped(arrays: Any, times: int) -> Any:
    return jax.tree.map(lambda x: x.update(shape=(times, *x.shape)), arrays)


@pytest.mark.parametrize("rows", [1, 20])
def test_what_is_out_of_reach_is_refused(rows):
    arrays, call = in_8_bits(rows, batch=8, keys=3 << 17)  # 3 GiB each
    with pytest.raises(NotImplementedError, match=r"key.shape=\(8, 393216, 8, 128\), value.shape=.*None"):
        lowered_for_cuda(functools.partial(call, name="triton"), *arrays)
    assert kernels_in(lowered_for_cuda(functools.partial(call, name=None), *arrays).as_text()) == []


@pytest.mark.parametrize("name", [None, "triton"])
@pytest.mark.parametrize("rows", [1, 20])
def test_what_vmap_puts_out_of_reach_is_refused(name, rows):
    """The checker saw an eighth of it; with wrong offsets the numbers would be wrong."""
    arrays, call = in_8_bits(rows, batch=1, keys=3 << 17)
    run = jax.vmap(functools.partial(call, name=name))
    with pytest.raises(NotImplementedError, match=r"key of mqa_.* shape=\(8, 393216, 8, 128\), dtype=int8, .*xla'"):
        lowered_for_cuda(run, *mapped(arrays, 8))
    kernels = {1: ["mqa_decode", "mqa_merge"], 20: ["mqa_forward"]}[rows]
    for times in (2, 16):  # 0.75 and 6 GiB, on both sides of what is wrong
        assert kernels_in(lowered_for_cuda(run, *mapped(arrays, times)).as_text()) == kernels


@pytest.mark.parametrize("axes", [0, None])
def test_a_mapped_mask(axes):
    """Mapped over, it is out of reach; where all calls share it, it is not."""
    query, mask = shaped(1, 2048, 8, 16), shaped(1, 8, 2048, 8192, dtype=jnp.bool_)  # 128 MiB
    key = shaped(1, 8192, 8, 16)
    call = lambda query, key, mask: mqa_jax.dot_product_attention(query, key, key, mask=mask, implementation="triton")
    arrays = (*mapped((query, key), 20), mask if axes is None else mapped(mask, 20))
    run = jax.vmap(call, in_axes=(0, 0, axes))
    if axes is None:
        assert kernels_in(lowered_for_cuda(run, *arrays).as_text()) == ["mqa_forward"]
        return
    with pytest.raises(NotImplementedError, match=r"allowed of mqa_forward has shape=\(20, 8, 2048, 8192\)"):
        lowered_for_cuda(run, *arrays)


def test_gradients_under_vmap():
    query, key, mask = shaped(1, 2048, 8, 16), shaped(1, 8192, 8, 16), shaped(1, 8, 2048, 8192, dtype=jnp.bool_)
    call = lambda query, key, mask: mqa_jax.dot_product_attention(query, key, key, mask=mask, implementation="triton")
    gradient = jax.grad(lambda *arrays: call(*arrays).astype(jnp.float32).sum())
    with pytest.raises(NotImplementedError, match=r"allowed of mqa_"):
        lowered_for_cuda(jax.vmap(gradient), *mapped((query, key, mask), 20))


@pytest.mark.parametrize("size", [2 * GIB, 4 * GIB])
def test_both_ends_are_out_of_reach(size):
    assert lowering.is_out_of_reach(shaped(size, dtype=jnp.int8))
    assert not lowering.is_out_of_reach(shaped(size, dtype=jnp.bfloat16))
    beyond = size - 1 if size == 2 * GIB else size + 1
    assert not lowering.is_out_of_reach(shaped(beyond, dtype=jnp.bool_))


# -- the warning of the backend ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_deprecation_warning_of_the_backend_is_silent():
    """JAX 0.11 and later give it at each lowering; in this suite every warning is an error."""
    query = jnp.ones((1, 20, 2, 16))
    jax.clear_caches()
    before = list(warnings.filters)
    gradient = jax.grad(lambda x: mqa_jax.dot_product_attention(x, x, x, implementation="triton").sum())
    assert len(kernels_in(lowered_for_cuda(gradient, query).as_text())) == 3
    assert warnings.filters == before


@pytest.mark.skipif(lowering.quiet_parameters() is pallas_triton.CompilerParams, reason="JAX does not warn")
def test_kernels_of_others_go_on_warning():
    def kernel(x, out):
        out[...] = x[...] + 1

    shape = jax.ShapeDtypeStruct((16,), jnp.float32)
    parameters = pallas_triton.CompilerParams(num_warps=1)
    run = pallas.pallas_call(kernel, out_shape=shape, compiler_params=parameters)
    with pytest.warns(DeprecationWarning, match="The Pallas Triton backend is deprecated"):
        lowered_for_cuda(run, shape)


IMPORTED = """
import warnings
warnings.simplefilter("error")
import jax
jax.config.update("jax_platforms", "cpu")
import jax.experimental.pallas.triton, flax.linen, jaxtyping
before = list(warnings.filters)
import mqa_jax
assert warnings.filters == before, set(warnings.filters) - set(before)
"""


def test_importing_leaves_the_filters_of_warnings_alone():
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTED], check=True, cwd=ROOT)
