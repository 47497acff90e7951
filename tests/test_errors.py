"""The message of every error, one line each: the rule, the values, the remedy."""

import ast
import functools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_hf_checkpoint

import mqa_jax
from mqa_jax import hf_attention, parity, torch_arrays, torch_interop, torch_modules
from mqa_jax.checks import checked_inputs
from mqa_jax.kernels import tile_config
from mqa_jax.kernels.tile_config import TileConfig
from mqa_jax.options import Options

RNG = jax.random.key(0)
ones = jnp.ones
QUERY, KEY = ones((2, 5, 4, 8)), ones((2, 7, 2, 8))


def attend(query=QUERY, key=KEY, value=None, *arguments, **options):
    return mqa_jax.dot_product_attention(query, key, key if value is None else value, *arguments, **options)


FUNCTION = {
    "rank": (lambda: attend(ones((4, 8))), r"query must be \[..., T, N, H\].*query.shape=\(4, 8\).*one head is N = 1"),
    "leading axes": (lambda: attend(key=ones((3, 7, 2, 8))), r"same leading axes.*key.shape=\(3, 7, 2, 8\).*Broadcast"),
    "other rank": (lambda: attend(key=ones((7, 2, 8))), r"same leading axes.*key.shape=\(7, 2, 8\)"),
    "lengths of k and v": (lambda: attend(value=ones((2, 6, 2, 8))), r"agree in S and K.*value.shape=\(2, 6, 2, 8\)"),
    "heads of k and v": (lambda: attend(value=ones((2, 7, 1, 8))), r"agree in S and K.*value.shape=\(2, 7, 1, 8\)"),
    "features": (lambda: attend(key=ones((2, 7, 2, 6))), r"same number of features H.*key.shape=\(2, 7, 2, 6\)"),
    "heads": (
        lambda: attend(key=ones((2, 7, 3, 8))),
        r"multiple of the number of key/value heads: query_heads=4, kv_heads=3.*Is the layout",
    ),
    "no kv head": (lambda: attend(key=ones((2, 7, 0, 8))), r"query_heads=4, kv_heads=0"),
    "mixed dtypes": (
        lambda: attend(key=KEY.astype(jnp.bfloat16)),
        r"same dtype: query.dtype=float32, key.dtype=bfloat16.*Cast them with .astype",
    ),
    "integers": (
        lambda: attend(QUERY.astype(int), KEY.astype(int)),
        r"must be float32, bfloat16, float16 or float64: query.dtype=int32.*Cast",
    ),
    "bias dtype": (lambda: attend(bias=ones((5, 7), int)), r"bias must be floating: bias.dtype=int32.*goes to mask="),
    "mask dtype": (lambda: attend(mask=ones((5, 7))), r"mask must be bool.*mask.dtype=float32.*goes to bias="),
    "bias shape": (
        lambda: attend(bias=ones((3, 5, 7))),
        r"bias must broadcast to \[..., N, T, S\]: bias.shape=\(3, 5, 7\), .*=\(2, 4, 5, 7\).*size 1",
    ),
    "mask shape": (lambda: attend(mask=ones((2, 7), bool)), r"mask must broadcast.*mask.shape=\(2, 7\)"),
    "mask rank": (lambda: attend(mask=ones((1, 1, 1, 5, 7), bool)), r"mask must broadcast.*\(1, 1, 1, 5, 7\)"),
    "slopes": (
        lambda: attend(alibi_slopes=ones(3)),
        r"alibi_slopes must hold one floating point number for each query head.*shape=\(3,\).*query_heads=4",
    ),
    "slopes dtype": (lambda: attend(alibi_slopes=ones(4, int)), r"alibi_slopes.dtype=int32"),
    "sinks": (lambda: attend(sinks=ones((4, 1))), r"sinks must hold one .* sinks.shape=\(4, 1\)"),
    "one kind of segments": (
        lambda: attend(query_segment_ids=ones((2, 5), int)),
        r"go together: query_segment_ids is not None, key_value_segment_ids is None.*the same array twice",
    ),
    "segments dtype": (
        lambda: attend(query_segment_ids=ones((2, 5)), key_value_segment_ids=ones((2, 7))),
        r"query_segment_ids must hold integers: query_segment_ids.dtype=float32",
    ),
    "segments shape": (
        lambda: attend(query_segment_ids=ones((2, 5), int), key_value_segment_ids=ones((2, 5), int)),
        r"key_value_segment_ids.shape=\(2, 5\), expected \(2, 7\)",
    ),
    "lengths shape": (
        lambda: attend(key_value_seq_lengths=ones(3, int)),
        r"key_value_seq_lengths has the wrong shape: .*=\(3,\), expected \(2,\)",
    ),
    "lengths dtype": (lambda: attend(query_seq_lengths=ones(2)), r"query_seq_lengths must hold integers.*float32"),
    "too long": (
        lambda: attend(key_value_seq_lengths=np.array([7, 8])),
        r"between 0 and the length of the array: key_value_seq_lengths=\[7 8\], length=7",
    ),
    "negative length": (lambda: attend(query_seq_lengths=np.array([-1, 5])), r"query_seq_lengths=\[-1  5\], length=5"),
    "offset": (
        lambda: attend(query_offset=ones(3, int)),
        r"query_offset must be an integer or one integer for each batch row: query_offset.shape=\(3,\)",
    ),
    "offset dtype": (lambda: attend(query_offset=1.5), r"query_offset must be an integer.*dtype=float32"),
    "window": (lambda: attend(local_window_size=-1), r"int or \(left, right\), not negative: local_window_size=-1"),
    "window pair": (lambda: attend(local_window_size=(3, -2)), r"not negative: local_window_size=\(3, -2\)"),
    "window triple": (lambda: attend(local_window_size=(1, 2, 3)), r"local_window_size=\(1, 2, 3\).*None is no window"),
    "window type": (lambda: attend(local_window_size=2.0), r"local_window_size=2.0"),
    "scale": (lambda: attend(scale=float("nan")), r"scale must be finite: scale=nan"),
    "traced scale": (
        lambda: jax.jit(lambda x: attend(scale=x))(1.0),
        r"scale must be a number known when the call is traced.*multiply the query by it",
    ),
    "soft cap": (lambda: attend(logits_soft_cap=0), r"must be positive: logits_soft_cap=0.0. None is no cap"),
    "rate": (lambda: attend(dropout_rate=1.5), r"dropout_rate must lie between 0 and 1: dropout_rate=1.5"),
    "no rng": (lambda: attend(dropout_rate=0.1), r"dropout_rate=0.1 needs a key: pass dropout_rng=jax.random.key"),
    "scales alone": (
        lambda: attend(key_scale=ones((2, 7, 2)), value_scale=ones((2, 7, 2))),
        r"both int8 or both float8_e4m3fn go together with key_scale and value_scale: .*float32.*given.*quantize",
    ),
    "no scales": (lambda: attend(key=KEY.astype(jnp.int8)), r"key.dtype=int8, value.dtype=int8, scales are not given"),
    "one scale": (
        lambda: attend(key=KEY.astype(jnp.int8), key_scale=ones((2, 7, 2))),
        r"value_scale must be float32 \[..., S, K\].*value_scale.shape=None, key.shape=\(2, 7, 2, 8\).*quantize",
    ),
    "ring and lengths": (
        lambda: attend(key_value_ring_lengths=ones(2, int), key_value_seq_lengths=ones(2, int)),
        r"key_value_seq_lengths must be None: key_value_ring_lengths=\[1 1\], key_value_seq_lengths=\[1 1\]",
    ),
    "negative ring": (
        lambda: attend(key_value_ring_lengths=-ones(2, int)),
        r"must not be negative: key_value_ring_lengths=\[-1 -1\]",
    ),
    "quantized to": (
        lambda: mqa_jax.quantize(KEY, jnp.int4),
        r"quantized to one of \['int8', 'float8_e4m3fn'\]: dtype=int4",
    ),
    "implementation": (
        lambda: attend(implementation="tritn"),
        r"Unknown implementation='tritn': use None or one of \['cudnn', 'reference', 'triton', 'xla'\]",
    ),
}


def layer(name="GroupedQueryAttention", *arguments, **settings):
    arguments = arguments or (16, 4)
    return getattr(mqa_jax, name)(*arguments, **settings)


def call(module, *arguments, **options):
    return module.init(RNG, *(arguments or (ones((2, 5, 16)),)), **options)


PAST = ones((2, 3, 4, 4)), ones((2, 3, 4, 4))
MODULES = {
    "no dim": (lambda: layer("GroupedQueryAttention", 0, 4), r"needs dim .*and heads: dim=0, d_model=None, heads=4"),
    "no heads": (lambda: layer("MultiHeadAttention", 16, 0), r"MultiHeadAttention needs dim .* heads=0"),
    "two dims": (lambda: layer("GroupedQueryAttention", 16, 4, d_model=8), r"dim=16, d_model=8"),
    "dim and heads": (lambda: layer("GroupedQueryAttention", 16, 3), r"multiple of heads: dim=16, heads=3.*head_dim"),
    "kv_heads": (lambda: layer(kv_heads=3), r"heads must be a multiple of kv_heads: heads=4, kv_heads=3"),
    "kv_heads of MQA": (
        lambda: layer("MultiQueryAttention", kv_heads=2),
        r"MultiQueryAttention has 1 key/value head\(s\): kv_heads=2. Use GroupedQueryAttention",
    ),
    "kv_heads of MHA": (lambda: layer("MultiHeadAttention", kv_heads=2), r"has 4 key/value head\(s\): kv_heads=2"),
    "attn_impl": (lambda: layer(attn_impl="fast"), r"Unknown attn_impl='fast': use one of \[None, 'torch', 'flash'"),
    "fc_type": (lambda: layer(fc_type="te"), r"Unknown fc_type='te': 'torch', a plain dense layer"),
    "norm_type": (lambda: layer(norm_type="batchnorm"), r"Unknown norm_type='batchnorm': use one of layernorm, low_"),
    "alibi": (lambda: layer(alibi="bloom"), r"Unknown alibi='bloom': use True, False or 'falcon'"),
    "two norms": (lambda: layer(qk_ln=True, qk_gn=True), r"qk_ln=True, qk_gn=True. Choose one"),
    "x": (lambda: call(layer(), ones(16)), r"x must be \[..., T, D\]: x.shape=\(16,\)"),
    "past and inputs_k": (
        lambda: call(layer(), ones((2, 5, 16)), PAST, inputs_k=ones((2, 5, 16))),
        r"Only one of these .* past_key_value and inputs_k",
    ),
    "past shape": (
        lambda: call(layer(), ones((2, 5, 16)), (ones((2, 3, 16)),) * 2),
        r"past_key_value must be \(key, value\), each \[..., length, kv_heads, head_dim\].*torch_interop converts",
    ),
    "causal cross": (
        lambda: call(layer(), inputs_k=ones((2, 7, 16))),
        r"inputs_k of another length has no agreed meaning: x.shape=\(2, 5, 16\).*Pass causal=False",
    ),
    "two masks": (
        lambda: call(layer(), mask=ones((2, 5), bool), attention_mask=ones((2, 5), bool)),
        r"mask and attention_mask are two names of one argument: pass one",
    ),
    "mask rank": (lambda: call(layer(), mask=ones((5,), bool)), r"mask must be \[..., S\].*mask.shape=\(5,\)"),
    "bias rank": (lambda: call(layer(), bias=ones(5)), r"bias must be \[..., N, T, S\]: bias.shape=\(5,\).*size 1"),
    "segments and past": (
        lambda: call(layer(), ones((2, 5, 16)), PAST, segment_ids=ones((2, 5), int)),
        r"segment_ids separate packed sequences in self-attention .* with past_key_value pass a mask",
    ),
    "no dropout decision": (
        lambda: call(layer(attn_pdrop=0.1)),
        r"\"deterministic\" must be passed to the constructor or at call time",
    ),
    "odd head_dim": (lambda: call(layer(head_dim=3, rope=mqa_jax.Rope())), r"head_dim must be even: head_dim=3"),
    "slopes": (lambda: mqa_jax.alibi_slopes(0), r"alibi_slopes needs at least one head: heads=0"),
    "FlashAttention": (
        lambda: mqa_jax.FlashAttention().apply({}, *(ones((5, 8)),) * 3),
        r"FlashAttention takes q \[B, N, T, H\].*q.shape=\(5, 8\)",
    ),
}


def cached(module=None, max_length=8, **options):
    """A module that is given 5 tokens and has room for max_length."""
    module = layer() if module is None else module
    x = ones((2, 5, 16))
    params = module.init(RNG, x)["params"]
    cache = options.pop("cache", None) or mqa_jax.init_cache(module, 2, max_length, x)
    return module.apply({"params": params, "cache": cache}, options.pop("x", x), mutable=["cache"], **options)


CACHE = {
    "overflow": (
        lambda: cached(max_length=4),
        r"cache is full: cache_index=\[5 5\] after this call, max_length=4. Make a longer cache .* reset_cache",
    ),
    "batch": (lambda: cached(x=ones((3, 5, 16))), r"New keys must fit the cache .*=\(2, 8, 4, 4\): key.shape=\(3, 5,"),
    "rank": (lambda: cached(x=ones((5, 16))), r"With a cache x must be \[batch, T, D\]: x.shape=\(5, 16\)"),
    "inputs_k too": (lambda: cached(inputs_k=ones((2, 5, 16))), r"got a cache collection and inputs_k"),
    "empty": (lambda: layer().init_cache(0, 8), r"at least one row and one position: batch=0, max_length=8"),
    "no attention": (
        lambda: mqa_jax.init_cache(nn.Dense(3), 2, 8, ones((2, 5))),
        r"holds no attention module of mqa_jax: Dense",
    ),
    "layout": (lambda: layer(cache_layout="paged"), r"Unknown cache_layout='paged': use one of \('static', 'ring'\)"),
    "ring without a window": (
        lambda: layer(cache_layout="ring"),
        r"cache_layout='ring' needs local_window_size, local_window_size=None. Or use cache_layout='static'",
    ),
    "dtype": (
        lambda: layer(cache_dtype="float8_e5m2"),
        r"cached as one of \['float32', .*'float8_e4m3fn'\]: dtype=float8_e5m2",
    ),
    "dtype of init_cache": (lambda: layer().init_cache(2, 8, dtype=jnp.int4), r"cached as one of .*: dtype=int4"),
    "another window": (
        lambda: cached(
            layer(local_window_size=9), cache=layer(cache_layout="ring", local_window_size=3).init_cache(2, 8)
        ),
        r"local_window_size=\(9, 9\), slots=19. Make the cache with this module's init_cache",
    ),
    "short mask for a ring": (
        lambda: cached(layer(cache_layout="ring", local_window_size=3), mask=ones((2, 4), bool)),
        r"column for each position.*positions=\[5 5\] after this call, columns=4. Make it longer",
    ),
    "reset": (lambda: mqa_jax.reset_cache({}, np.array([0, 1])), r"rows must be bool \[batch\].*rows.dtype=int"),
}


def _state(heads=2, dim=8, **changes):
    rng = np.random.default_rng(0)
    state = {
        "Wqkv.weight": rng.standard_normal((dim + 2 * dim // heads, dim)),
        "out_proj.weight": rng.standard_normal((dim, dim)),
    }
    return {name: x for name, x in {**state, **changes}.items() if x is not None}


convert = functools.partial(torch_interop.from_state_dict, heads=2, kv_heads=1)
TORCH = {
    "unknown": (lambda: convert({"w": np.ones((2, 3))}), r"No known attention layout: found \{'w': \(2, 3\)\}.*Wqkv"),
    "prefix": (lambda: convert(_state(), prefix="layers.0."), r"found \{\}; expected one of .*Is the prefix right"),
    "layout": (lambda: convert(_state(), layout="qkv"), r"Unknown layout='qkv': use one of \['fused', 'unfused'"),
    "another layout": (
        lambda: convert(_state(), layout="llama"),
        r"missing: q_proj.weight, .*; unexpected: Wqkv.weight",
    ),
    "missing": (
        lambda: convert(_state(**{"out_proj.weight": None})),
        r"layout='fused' with heads=2, kv_heads=1. missing: out_proj.weight. Found .* expected .*out_proj.weight",
    ),
    "to_jax: float64": (
        lambda: torch_arrays.to_jax(SimpleNamespace(dtype="torch.float64")),
        r"JAX would narrow this tensor: dtype='float64'. Cast it, or jax.config.update\('jax_enable_x64', True\)",
    ),
    "one bias of three": (
        lambda: convert(
            {**{f"{n}_proj.weight": np.ones((8, 8)) for n in "qkvo"}, "q_proj.bias": np.ones(8)}, kv_heads=2
        ),
        r"missing: k_proj.bias, v_proj.bias",
    ),
    "extra": (
        lambda: convert(_state(**{"rotary.inv_freq": np.ones(4)})),
        r"unexpected: rotary.inv_freq. Found .*'rotary.inv_freq': \(4,\)",
    ),
    "heads": (lambda: convert(_state(), heads=3), r"heads=3, kv_heads=1. .*not divisible by heads: Wqkv.weight"),
    "kv_heads": (lambda: convert(_state(), kv_heads=3), r"heads must be a multiple of kv_heads: heads=2, kv_heads=3"),
    "output": (
        lambda: convert(_state(**{"out_proj.weight": np.ones((8, 6))})),
        r"misshapen: out_proj.weight. Found .*'out_proj.weight': \(8, 6\).*expected .*'out_proj.weight': \(None, 8\)",
    ),
    "transposed": (
        lambda: convert({"c_attn.weight": np.ones((12, 24)), "c_proj.weight": np.ones((12, 12))}, heads=3),
        r"layout='gpt_bigcode'.*misshapen: .*c_proj.weight.*not divisible by heads: c_attn.weight",
    ),
    "cache": (
        lambda: torch_interop.past_key_value_from_torch(np.ones((2, 3, 4, 5)), np.ones((2, 3, 4, 5)), 2),
        r"A cache is \[b, kv, head_dim, s\].*kv_heads=2",
    ),
    "heads of a module": (
        lambda: torch_modules.from_torch(SimpleNamespace(state_dict=_state)),
        r"SimpleNamespace does not tell its number of heads: heads=None. Pass heads=, and kv_heads=",
    ),
    "dtype to compare in": (
        lambda: parity.tolerance_of("float64"),
        r"compared in one of \['float32', 'bfloat16', 'float16'\]: dtype='float64'. Cast the layer",
    ),
    "nothing to plot": (
        lambda: parity.Report(()).plot(Path("nowhere.png")),
        r"There is nothing to plot: this torch layer does not show what goes into its projection",
    ),
    "another module": (
        lambda: torch_modules.to_torch(
            mqa_jax.MultiQueryAttention(8, 2),
            {"params": convert(_state())},
            like=SimpleNamespace(state_dict=lambda: _state(dim=4)),
        ),
        r"do not fit SimpleNamespace; ours and its shapes: \{'Wqkv.weight': \(\(16, 8\), \(8, 4\)\)",
    ),
    "a module with other heads": (
        lambda: torch_modules.to_torch(
            mqa_jax.MultiQueryAttention(8, 2), {}, like=SimpleNamespace(state_dict=_state, n_heads=4)
        ),
        r"SimpleNamespace has other heads than our module: its \{'heads': 4\}, ours \{'heads': 2, 'kv_heads': 1\}",
    ),
    "no keys to write": (
        lambda: torch_interop.to_state_dict({"query": {"kernel": np.ones((8, 2, 4))}}, layout="fused"),
        r"found \['query'\], expected \['key', 'out', 'query', 'value'\] and perhaps \['k_ln', 'q_ln'\]",
    ),
}

KERNELS: dict[str, Any] = {
    "rows of a tile": (lambda: TileConfig(24, 16, 4, 2), r"rows must be a power of two from 16 on: rows=24"),
    "features of a tile": (
        lambda: TileConfig(16, 16, 4, 2, 8),
        r"features must be a power of two from 16 on: features=8",
    ),
    "stages of a tile": (lambda: TileConfig(16, 16, 4, 0), r"stages must be at least 1: stages=0"),
    "architecture": (
        lambda: tile_config.assuming("sm70").__enter__(),
        r"architecture must be one of \('sm80', 'sm89', 'sm90', 'sm100'\): architecture='sm70'",
    ),
    "no entry in the table": (
        lambda: tile_config.choose("sideways", checked_inputs(QUERY, KEY, KEY, None, None, Options())),
        r"no tiles for direction='sideways', dtype='float32', .*, head_dim=8. `python -m benchmarks.tune`",
    ),
}

VALUE_ERRORS = {**{f"function: {k}": v for k, v in FUNCTION.items()}, **{f"module: {k}": v for k, v in MODULES.items()}}
VALUE_ERRORS |= {**{f"cache: {k}": v for k, v in CACHE.items()}, **{f"torch: {k}": v for k, v in TORCH.items()}}
VALUE_ERRORS |= {f"kernels: {k}": v for k, v in KERNELS.items()}


@pytest.mark.parametrize("name", VALUE_ERRORS)
def test_wrong_calls(name):
    wrong, message = VALUE_ERRORS[name]
    with pytest.raises(ValueError, match=r"(?s)" + message):
        wrong()


HALF = {"query": QUERY.astype(jnp.bfloat16), "key": KEY.astype(jnp.bfloat16)}
cudnn = functools.partial(attend, implementation="cudnn", **HALF)


def _cudnn_residual():
    """As on a GPU, where cuDNN answers."""
    with mock.patch.object(jax.nn, "dot_product_attention", lambda query, *_, **__: query):
        return cudnn(return_residual=True)


triton = functools.partial(attend, implementation="triton")


def _on_an_old_gpu():
    with mock.patch.object(tile_config, "capability_at_hand", return_value=75):
        return triton()


EIGHT_BITS = mqa_jax.quantize(KEY, "int8")


def _float8_on_an_a100():
    key, scale = mqa_jax.quantize(KEY, "float8_e4m3fn")
    with tile_config.assuming("sm80"):
        return triton(key=key, key_scale=scale, value_scale=scale)


def _with_a_large_mask():
    query, key = (
        jax.ShapeDtypeStruct((1, 2**16, 1, 8), jnp.float32),
        jax.ShapeDtypeStruct((1, 2**15, 1, 8), jnp.float32),
    )
    mask = jax.ShapeDtypeStruct((2**16, 2**15), bool)
    return jax.eval_shape(lambda q, k, m: triton(q, k, mask=m), query, key, mask)


mha = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4, attention_fn=mqa_jax.attention_fn)
grad = functools.partial(jax.grad, argnums=0)

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
    "triton: no GPU": (triton, r"'triton' runs on cuda alone, and this program is lowered for another platform.*Use"),
    "triton: head size": (
        lambda: triton(ones((2, 5, 4, 264)), ones((2, 7, 2, 264))),
        r"'triton' cannot compute this call: head sizes of at most 256 only \(H=264, V=264\); use implementation=None",
    ),
    "triton: precision": (
        lambda: triton(precision="BF16_BF16_F32_X3"),
        r"products of float32, or of tf32 where the precision says so \(inputs.precision='BF16_BF16_F32_X3'\)",
    ),
    "triton: mixed precision": (lambda: triton(precision=("high", "highest")), r"precision=\('high', 'highest'\)"),
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
    "ring: weights": (
        lambda: cached(layer(cache_layout="ring", local_window_size=3), needs_weights=True),
        r"which a ring buffer has not: cache_layout='ring'. Use cache_layout='static'",
    ),
    "cudnn: ring": (lambda: cudnn(key_value_ring_lengths=ones(2, int)), r"keys in a ring buffer"),
    "cudnn: 8 bits": (
        lambda: cudnn(key=EIGHT_BITS[0], key_scale=EIGHT_BITS[1], value_scale=EIGHT_BITS[1]),
        r"keys and values in 8 bits",
    ),
    "triton: old GPU": (_on_an_old_gpu, r"GPUs from compute capability 8.0 on only \(this one: 7.5\)"),
    "config: model": (
        lambda: hf_attention.attention_of(dict(model_type="gpt2")),
        r"No known attention layer: model_type='gpt2', known are \['bert', 'falcon'",
    ),
    "config: rope": (
        lambda: hf_attention.rope_of(dict(rope_scaling=dict(type="yarn", factor=2.0))),
        r"RoPE scaling is 'default', 'linear' or 'llama3': rope_type='yarn'",
    ),
    "falcon's ALiBi": (
        lambda: layer(alibi="falcon", cache_layout="ring", local_window_size=3),
        r"a ring buffer has not: alibi='falcon', alibi_bias_max=8, cache_layout='ring'",
    ),
    "config: mpt": (
        lambda: hf_attention.attention_of(
            dict(model_type="mpt", d_model=8, n_heads=2, attn_config=dict(qk_ln=True, alibi_bias_max=4))
        ),
        r"transformers ignores these settings of MPT: attn_config=\{'alibi_bias_max': 4, 'qk_ln': True\}",
    ),
    "jvp": (lambda: jax.jvp(attend, (QUERY,), (QUERY,)), r"no forward-mode derivative.*implementation='reference'"),
    "linearize": (lambda: jax.linearize(attend, QUERY)[1](QUERY), r"forward-mode.*implementation='reference'"),
    "second derivative": (
        lambda: grad(lambda q: grad(lambda q: attend(q).sum())(q).sum())(QUERY),
        r"no second derivative.*implementation='reference' \(modules: attn_impl='reference'\)",
    ),
    "hessian": (lambda: jax.hessian(lambda q: attend(q).sum())(QUERY), r"implementation='reference'"),
    "batch_first": (
        lambda: mqa_jax.FlashMHA(16, 4, batch_first=False).init(RNG, ones((2, 5, 16))),
        r"batch_first=False is not supported: swap the first two axes",
    ),
    "bias_kv and dropout": (
        lambda: layer(add_bias_kv=True, attn_pdrop=0.1),
        r"add_bias_kv works without dropout and soft cap only: attn_pdrop=0.1",
    ),
    "adapter: sow": (
        lambda: mha().init(RNG, ones((2, 5, 16)), sow_weights=True),
        r"cannot honour module \(sow_weights=True\): fused attention has no weights",
    ),
    "adapter: dropout": (
        lambda: mha(dropout_rate=0.1).init({"params": RNG, "dropout": RNG}, ones((2, 5, 16)), deterministic=False),
        r"broadcast_dropout=True: set broadcast_dropout=False",
    ),
    "adapter: einsum": (
        lambda: mqa_jax.attention_fn(QUERY, KEY, KEY, qk_attn_weights_einsum=jnp.einsum),
        r"cannot honour qk_attn_weights_einsum",
    ),
    "adapter: other einsum": (
        lambda: mqa_jax.attention_fn(QUERY, KEY, KEY, attn_weights_value_einsum=jnp.einsum),
        r"cannot honour attn_weights_value_einsum",
    ),
    "adapter: positions": (
        lambda: mqa_jax.attention_fn(QUERY, KEY, KEY, input_positions=ones((2, 5), int)),
        r"rotate queries and keys first, with mqa_jax.Rope",
    ),
}


@pytest.mark.parametrize("name", NOT_POSSIBLE)
def test_what_an_implementation_cannot_do(name):
    impossible, message = NOT_POSSIBLE[name]
    with pytest.raises(NotImplementedError, match=r"(?s)" + message):
        impossible()


def test_everything_that_is_refused_to_the_fused_implementation_works_in_the_reference():
    attend_ = functools.partial(attend, implementation="reference")
    jax.jvp(attend_, (QUERY,), (QUERY,))
    jax.linearize(attend_, QUERY)[1](QUERY)
    assert jax.hessian(lambda q: attend_(q).sum())(QUERY).shape == QUERY.shape * 2


@pytest.mark.torch
def test_no_error_is_missing_from_these_tables():
    """Every `raise` of the package is reached by one of them."""
    package = Path(mqa_jax.__file__).parent
    written = {
        (path.name, node.lineno)
        for path in [*package.glob("*.py"), *(package / "kernels").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and "SystemExit" not in ast.unparse(node)  # of commands, in their own tests
    }
    assert written - _raised() == set()


def _raised() -> set[tuple[str, int | None]]:
    """Where the tables raise: file and line of each frame."""
    places = set()
    on_disk = test_hf_checkpoint.WRONG | test_hf_checkpoint.NEEDS_TORCH
    for wrong, *_ in [*VALUE_ERRORS.values(), *NOT_POSSIBLE.values(), *map(_in_a_folder, on_disk.values())]:
        try:
            wrong()
        except (ValueError, NotImplementedError, OSError, ImportError) as error:
            places |= {(Path(f.filename).name, f.lineno) for f in traceback.extract_tb(error.__traceback__)}
    return places


def _in_a_folder(case: tuple) -> tuple[Callable[[], object]]:
    def wrong() -> object:
        with tempfile.TemporaryDirectory() as folder:
            return case[0](Path(folder)).attention(0)

    return (wrong,)
