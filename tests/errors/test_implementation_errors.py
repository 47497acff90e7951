"""What implementations cannot compute, and tiles that are none."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from cuda_programs import lowered_for_cuda
from jax import export
from wrong_calls import KEY, QUERY, RNG, attend, ones, refused

import mqa_jax
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import gpu
from mqa_jax.kernels.triton import tile_config
from mqa_jax.kernels.triton.tile_config import TileConfig

KERNELS: dict[str, Any] = {
    "rows of a tile": (lambda: TileConfig(24, 16, 4, 2), r"rows must be a power of two from 16 on: rows=24"),
    "features of a tile": (
        lambda: TileConfig(16, 16, 4, 2, 8),
        r"features must be a power of two from 16 on: features=8",
    ),
    "stages of a tile": (lambda: TileConfig(16, 16, 4, 0), r"stages must be at least 1: stages=0"),
    "architecture": (
        lambda: gpu.assuming("sm70").__enter__(),
        r"architecture must be one of \('sm80', 'sm89', 'sm90', 'sm100'\): architecture='sm70'",
    ),
    "no entry in the table": (
        lambda: tile_config.choose("sideways", inputs_of(QUERY, KEY, KEY)),
        r"no tiles for direction='sideways', dtype='float32', .*, head_dim=8. `python -m benchmarks.tune`",
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_wrong_tiles(name):
    refused(ValueError, KERNELS[name])


HALF = {"query": QUERY.astype(jnp.bfloat16), "key": KEY.astype(jnp.bfloat16)}
cudnn = functools.partial(attend, implementation="cudnn", **HALF)


def _cudnn_residual():
    """As on a GPU, where cuDNN answers."""
    with mock.patch.object(jax.nn, "dot_product_attention", lambda query, *_, **__: query):
        return cudnn(return_residual=True)


triton = functools.partial(attend, implementation="triton")


def _on_an_old_gpu():
    with mock.patch.object(gpu, "capability_at_hand", return_value=75):
        return triton()


EIGHT_BITS = mqa_jax.quantize(KEY, "int8")


def _float8_on_an_a100():
    key, scale = mqa_jax.quantize(KEY, "float8_e4m3fn")
    with gpu.assuming("sm80"):
        return triton(key=key, key_scale=scale, value_scale=scale)


def _with_a_large_mask():
    query, key = (
        jax.ShapeDtypeStruct((1, 2**16, 1, 8), jnp.float32),
        jax.ShapeDtypeStruct((1, 2**15, 1, 8), jnp.float32),
    )
    mask = jax.ShapeDtypeStruct((2**16, 2**15), bool)
    return jax.eval_shape(lambda q, k, m: triton(q, k, mask=m), query, key, mask)


def _with_a_symbol_for_heads():
    (heads,) = export.symbolic_shape("n")
    query = jax.ShapeDtypeStruct((2, 5, heads, 8), jnp.float32)
    return jax.eval_shape(lambda q: mqa_jax.dot_product_attention(q, q, q), query)


def _triton_with_a_symbol_for_the_batch():
    (batch,) = export.symbolic_shape("b")
    shaped = lambda length, heads: jax.ShapeDtypeStruct((batch, length, heads, 8), jnp.float32)
    return jax.eval_shape(lambda q, k: triton(q, k, k), shaped(5, 4), shaped(7, 2))


def _a_mask_that_vmap_makes_large():
    shaped = jax.ShapeDtypeStruct
    query, key = shaped((20, 1, 2048, 8, 16), jnp.float32), shaped((20, 1, 8192, 8, 16), jnp.float32)
    mask = shaped((20, 1, 8, 2048, 8192), bool)
    return lowered_for_cuda(jax.vmap(lambda q, k, m: triton(q, k, mask=m)), query, key, mask)


NOT_POSSIBLE: dict[str, Any] = {
    "cudnn: float32": (lambda: attend(implementation="cudnn"), r"'cudnn' cannot compute this call: dtype float32; use"),
    "cudnn: several": (
        lambda: cudnn(logits_soft_cap=1.0, sinks=ones(4)),
        r"cannot compute this call: sinks; logits_soft_cap; use implementation=None",
    ),
    "cudnn: alibi": (lambda: cudnn(alibi_slopes=ones(4)), r"alibi_slopes"),
    "cudnn: offset": (lambda: cudnn(query_offset=1), r"query_offset"),
    "cudnn: segments": (
        lambda: cudnn(query_segment_ids=ones((2, 5), int), key_value_segment_ids=ones((2, 7), int)),
        r"segment ids",
    ),
    "cudnn: dropout": (lambda: cudnn(dropout_rate=0.1, dropout_rng=RNG), r"dropout_rate \(it takes no traced key\)"),
    "cudnn: window": (lambda: cudnn(local_window_size=3), r"local_window_size without is_causal"),
    "cudnn: value": (lambda: cudnn(value=ones((2, 7, 2, 16), jnp.bfloat16)), r"value head size V different from H"),
    "cudnn: nothing": (lambda: cudnn(key=ones((2, 0, 2, 8), jnp.bfloat16)), r"no queries or keys"),
    "cudnn: residual": (_cudnn_residual, r"'cudnn' has no differentiable float32 log-sum-exp.*Use implementation=None"),
    "cudnn: no GPU": (cudnn, r"needs an NVIDIA GPU and cuDNN.*platform='cpu'\); use implementation=None"),
    "triton: no GPU": (triton, r"'triton' runs only on cuda, and this program is lowered for another platform.*Use"),
    "triton: head size": (
        lambda: triton(ones((2, 5, 4, 264)), ones((2, 7, 2, 264))),
        r"'triton' cannot compute this call: head sizes of at most 256 only \(H=264, V=264\); use implementation=None",
    ),
    "symbolic heads": (
        _with_a_symbol_for_heads,
        r"heads and features may not: query.shape=\(2, 5, n, 8\).*Export one program for each number of heads",
    ),
    "triton: symbols": (
        _triton_with_a_symbol_for_the_batch,
        r"known batches and lengths only, no symbols of jax.export \(B=b, T=5, S=7\)",
    ),
    "triton: precision": (
        lambda: triton(precision="BF16_BF16_F32_X3"),
        r"products of float32 or tf32 with float32 sums only \(precision=BF16_BF16_F32_X3\); use implementation=None",
    ),
    "triton: mixed precision": (lambda: triton(precision=("high", "highest")), r"precision=HIGH, HIGHEST"),
    "triton: a mask that vmap makes large": (
        _a_mask_that_vmap_makes_large,
        r"arrays of bytes of less than 2 or more than 4 GiB only: allowed of mqa_forward has shape=\(20, 8, 2048",
    ),
    "triton: mask": (
        _with_a_large_mask,
        r"arrays of bytes of less than 2 or more than 4 GiB only \(mask.shape=\(1, 1, 65536, 32768\)\)",
    ),
    "triton: float8": (_float8_on_an_a100, r"float8_e4m3fn from compute capability 8.9 on only \(this one: 8.0\)"),
    "8 bits: derivative": (
        lambda: jax.grad(lambda q: attend(q, EIGHT_BITS[0], key_scale=EIGHT_BITS[1], value_scale=EIGHT_BITS[1]).sum())(
            QUERY
        ),
        r"keys and values in 8 bits has no derivative.*implementation='reference'",
    ),
    "cudnn: ring": (lambda: cudnn(key_value_ring_lengths=ones(2, int)), r"keys in a ring buffer"),
    "cudnn: 8 bits": (
        lambda: cudnn(key=EIGHT_BITS[0], key_scale=EIGHT_BITS[1], value_scale=EIGHT_BITS[1]),
        r"keys and values in 8 bits",
    ),
    "triton: old GPU": (_on_an_old_gpu, r"GPUs from compute capability 8.0 on only \(this one: 7.5\)"),
}


@pytest.mark.parametrize("name", NOT_POSSIBLE)
def test_what_an_implementation_cannot_do(name):
    refused(NotImplementedError, NOT_POSSIBLE[name])
