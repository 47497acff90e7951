"""The message of every error, one line each: the rule, the values, the remedy."""

import ast
import functools
import math
import re
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
import test_hf_attention
import test_hf_checkpoint
import test_torch_interop
import test_torch_modules
from cuda_programs import lowered_for_cuda
from jax import export
from nnx_errors import MISTAKES, through_the_bridge
from skins import needs_modes

import mqa_jax
from mqa_jax import torch_interop
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import gpu
from mqa_jax.kernels.triton import tile_config
from mqa_jax.kernels.triton.tile_config import TileConfig
from mqa_jax.torch_interop import arrays as torch_arrays
from mqa_jax.torch_interop import modules as torch_modules
from mqa_jax.torch_interop import parity
from mqa_jax.torch_interop.hugging_face import attention as hf_attention

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
    "bias dtype": (
        lambda: attend(bias=ones((5, 7), int)),
        r"bias must be floating: bias.dtype=int32. A mask of 0 and 1 goes to mask=, as bool: .astype\(bool\)",
    ),
    "bias bool": (lambda: attend(bias=ones((5, 7), bool)), r"bias.dtype=bool. A boolean mask goes to mask="),
    "bias complex": (
        lambda: attend(bias=ones((5, 7), complex)),
        r"bias.dtype=complex64. Cast it with .astype\(float\)",
    ),
    "mask dtype": (
        lambda: attend(mask=ones((5, 7))),
        r"mask must be bool: mask.dtype=float32. .* 0 and 1 is mask.astype\(bool\), .*; one that is added .* bias=",
    ),
    "mask of a tokenizer": (
        lambda: attend(mask=np.ones((5, 7), int)),
        r"mask must be bool: mask.dtype=int32. .*mask.astype\(bool\), True = may attend\.$",  # not a word of bias=
    ),
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
        r"query_segment_ids must hold integers of at most 64 bits: query_segment_ids.dtype=float32. Cast it with",
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
    "lengths beyond 32 bits": (
        lambda: attend(key_value_seq_lengths=np.array([7, 2**32 + 1])),
        r"between 0 and the length of the array: key_value_seq_lengths=\[\s*7 4294967297\], length=7",
    ),
    "lengths, unsigned": (
        lambda: attend(query_seq_lengths=np.array([5, 2**32 - 1], np.uint32)),
        r"query_seq_lengths=\[\s*5 4294967295\], length=5",
    ),
    "too long": (
        lambda: attend(key_value_seq_lengths=np.array([7, 8])),
        r"between 0 and the length of the array: key_value_seq_lengths=\[7 8\], length=7",
    ),
    "negative length": (lambda: attend(query_seq_lengths=np.array([-1, 5])), r"query_seq_lengths=\[-1  5\], length=5"),
    "offset": (
        lambda: attend(query_offset=ones(3, int)),
        r"query_offset has the wrong shape: query_offset.shape=\(3,\), expected \(\) or \(2,\)",
    ),
    "offset dtype": (lambda: attend(query_offset=1.5), r"query_offset must hold integers.*dtype=float64. Cast it with"),
    "no offset": (lambda: attend(query_offset=None), r"query_offset must hold integers.*dtype=object"),
    "offset bool": (lambda: attend(query_offset=False), r"query_offset must hold integers.*dtype=bool"),
    "offset beyond 32 bits": (
        lambda: attend(is_causal=True, query_offset=2**31),
        r"query_offset must leave the positions of all queries in 32 bits, from -2147483648 to 2147483643: "
        r"query_offset=2147483648, where the first key is at 0",
    ),
    "offset of the last query": (lambda: attend(query_offset=2**31 - 4), r"to 2147483643: query_offset=2147483644"),
    "offset far beyond 32 bits": (lambda: attend(query_offset=-(2**70)), r"query_offset must hold integers of at most"),
    "offsets beyond 32 bits": (
        lambda: attend(query_offset=np.array([0, -(2**31) - 1])),
        r"query_offset=\[\s*0 -2147483649\]",
    ),
    "offsets, unsigned": (
        lambda: attend(query_offset=jnp.array([0, 2**32 - 1], jnp.uint32)),
        r"query_offset=\[\s*0 4294967295\]",
    ),
    "segments beyond 32 bits": (
        lambda: attend(query_segment_ids=np.full((2, 5), 2**32), key_value_segment_ids=np.zeros((2, 7), np.int32)),
        r"query_segment_ids must fit 32 bits: query_segment_ids=.*4294967296.*number the segments 0, 1, 2",
    ),
    "key segments beyond 32 bits": (
        lambda: attend(
            query_segment_ids=np.zeros((2, 5), np.uint8), key_value_segment_ids=np.full((2, 7), 2**31, np.uint32)
        ),
        r"key_value_segment_ids must fit 32 bits: key_value_segment_ids=.*2147483648",
    ),
    "traced segments of two dtypes": (
        lambda: jax.jit(lambda q, k: attend(query_segment_ids=q, key_value_segment_ids=k))(
            ones((2, 5), jnp.uint32), ones((2, 7), int)
        ),
        r"may not fit 32 bits must have one dtype: query.dtype=uint32, key.dtype=int32. Cast both with .astype",
    ),
    "ring beyond 32 bits": (
        lambda: attend(key_value_ring_lengths=np.array([1, 2**31])),
        r"must not be negative, and fit 32 bits: key_value_ring_lengths=\[\s*1 2147483648\]",
    ),
    "ragged lengths": (
        lambda: attend(key_value_seq_lengths=[[1], [1, 2]]),
        r"key_value_seq_lengths must be an array of numbers: key_value_seq_lengths=\[\[1\], \[1, 2\]\] \(list\)",
    ),
    "window": (
        lambda: attend(local_window_size=-2),
        r"int or \(left, right\), not negative, .*: local_window_size=-2. .* -1 is no limit there, None is no window",
    ),
    "window pair": (lambda: attend(local_window_size=(3, -2)), r"not negative, .*: local_window_size=\(3, -2\)"),
    "window triple": (lambda: attend(local_window_size=(1, 2, 3)), r"local_window_size=\(1, 2, 3\).*None is no window"),
    "window type": (lambda: attend(local_window_size=2.0), r"local_window_size=2.0"),
    "window bool": (lambda: attend(local_window_size=True), r"int or \(left, right\).*local_window_size=True"),
    "window of bools": (lambda: attend(local_window_size=(np.True_, 1)), r"local_window_size=\(np.True_, 1\)"),
    "traced window": (
        lambda: jax.jit(lambda n: attend(local_window_size=n))(3),
        r"local_window_size must be .* known when the call is traced \(under jax.jit, one of the static_argnames\)",
    ),
    "scale": (lambda: attend(scale=float("nan")), r"scale must be a finite number, .*: scale=nan \(float\). For a"),
    "scale of letters": (lambda: attend(scale="0.5"), r"scale must be a finite number, .*: scale='0.5' \(str\)"),
    "scales of heads": (lambda: attend(scale=np.ones(4)), r"scale must be .*: scale=float64\[4\].*multiply the query"),
    "large scale": (lambda: attend(scale=10**400), r"scale must be a finite number, .*: scale=1000.* \(int\)"),
    "traced scale": (
        lambda: jax.jit(lambda x: attend(scale=x))(1.0),
        r"scale must be a finite number, known when .*: scale=float32\[\]. .*multiply the query by it",
    ),
    "soft cap": (lambda: attend(logits_soft_cap=0), r"must be positive: logits_soft_cap=0.0. None is no cap"),
    "traced soft cap": (
        lambda: jax.jit(lambda x: attend(logits_soft_cap=x))(1.0),
        r"logits_soft_cap must be a finite number, known when .* static_argnames\): .*=float32\[\]. None is no cap",
    ),
    "rate": (lambda: attend(dropout_rate=1.5), r"dropout_rate must lie between 0 and 1: dropout_rate=1.5. 0 is no"),
    "rate that is none": (lambda: attend(dropout_rate=math.nan), r"dropout_rate must be a finite number.*=nan"),
    "no rate": (lambda: attend(dropout_rate=None), r"dropout_rate must be .* dropout_rate=None.* 0 is no dropout"),
    "traced rate": (
        lambda: jax.jit(lambda rate: attend(dropout_rate=rate, dropout_rng=RNG))(0.1),
        r"dropout_rate must be .* known when the call is traced .*=float32\[\]. Each rate is a program of its own",
    ),
    "no rng": (lambda: attend(dropout_rate=0.1), r"dropout_rate=0.1 needs a key: pass dropout_rng=jax.random.key"),
    "number for rng": (lambda: attend(dropout_rate=0.1, dropout_rng=0), r"needs a key: .*; dropout_rng=0 \(int\)"),
    "several rngs": (
        lambda: attend(dropout_rate=0.1, dropout_rng=jax.random.split(RNG)),
        r"needs a key: .*, one key; dropout_rng=key<fry>\[2\]",
    ),
    "is_causal": (lambda: attend(is_causal="no"), r"is_causal must be True or False, .*: is_causal='no' \(str\)"),
    "traced is_causal": (
        lambda: jax.jit(lambda x: attend(is_causal=x))(True),
        r"is_causal must be True or False, known when .*static_argnames\): is_causal=bool\[\]",
    ),
    "traced return_residual": (
        lambda: jax.jit(lambda x: attend(return_residual=x))(True),
        r"return_residual must be True or False, .*: return_residual=bool\[\]",
    ),
    "query that is none": (lambda: attend(None), r"query must be an array of numbers: query=None.*jnp.asarray"),
    "objects": (
        lambda: attend(mask=np.array([[None]])),
        r"mask must be an array of numbers: mask=object\[1, 1\]. Make one with jnp.asarray",
    ),
    "letters": (lambda: attend(sinks="abcd"), r"sinks must be an array of numbers: sinks='abcd' \(str\)"),
    "no features": (
        lambda: attend(ones((2, 5, 4, 0)), ones((2, 7, 2, 0)), KEY),
        r"at least one feature, H and V: query.shape=\(2, 5, 4, 0\)",
    ),
    "no value features": (lambda: attend(value=ones((2, 7, 2, 0))), r"H and V: .*value.shape=\(2, 7, 2, 0\)"),
    "scales alone": (
        lambda: attend(key_scale=ones((2, 7, 2)), value_scale=ones((2, 7, 2))),
        r"both int8 or both float8_e4m3fn go together with key_scale and value_scale: .*float32.*given.*quantize",
    ),
    "no scales": (lambda: attend(key=KEY.astype(jnp.int8)), r"key.dtype=int8, value.dtype=int8, scales are not given"),
    "one scale": (
        lambda: attend(key=KEY.astype(jnp.int8), key_scale=ones((2, 7, 2))),
        r"value_scale must be float32 \[..., S, K\].*value_scale.shape=None, .*key.shape=\(2, 7, 2, 8\).*quantize",
    ),
    "ring and lengths": (
        lambda: attend(key_value_ring_lengths=ones(2, int), key_value_seq_lengths=ones(2, int)),
        r"key_value_seq_lengths must be None: key_value_ring_lengths=\[1 1\], key_value_seq_lengths=\[1 1\]",
    ),
    "negative ring": (
        lambda: attend(key_value_ring_lengths=-ones(2, int)),
        r"must not be negative, and fit 32 bits: key_value_ring_lengths=\[-1 -1\], which counts all tokens",
    ),
    "quantized to": (
        lambda: mqa_jax.quantize(KEY, jnp.int4),
        r"quantized to one of \['int8', 'float8_e4m3fn'\]: dtype=int4",
    ),
    "implementation": (
        lambda: attend(implementation="tritn"),
        r"Unknown implementation='tritn': use None or one of \['cudnn', 'reference', 'triton', 'xla'\]",
    ),
    "implementations": (
        lambda: attend(implementation=["xla"]),
        r"Unknown implementation=\['xla'\]: use None or one of",
    ),
    "parts": (
        lambda: mqa_jax.merge_partials(ones((2, 5, 4, 8)), ones((2, 4, 5))),
        r"outs must be \[P, ..., T, N, V\] .*: outs.shape=\(2, 5, 4, 8\), log_sum_exps.shape=\(2, 4, 5\).*jnp.stack",
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
    "two dims": (
        lambda: layer("GroupedQueryAttention", 16, 4, d_model=8),
        r"two names of one setting: dim=16, d_model=8. Give one; to clone a module that has both, change both",
    ),
    "no output": (
        lambda: layer(output_projection=False, out_features=3),
        r"output projection that is left out: output_projection=False, out_features=3, use_out_bias=None",
    ),
    "frequencies": (
        lambda: mqa_jax.Llama3Scaling(low_freq_factor=4.0),
        r"low_freq_factor must be less than high_freq_factor: low_freq_factor=4.0, high_freq_factor=4.0",
    ),
    "integer mask": (
        lambda: call(layer(), attention_mask=ones((2, 5), int)),
        r"attention_mask must be bool.*attention_mask.dtype=int32. One of 0 and 1.*is attention_mask.astype\(bool\)",
    ),
    "mask of all rows": (
        lambda: call(layer(), mask=ones((5, 5), bool)),
        r"where ... are the leading axes of x or 1: mask.shape=\(5, 5\), leading axes of x=\(2,\)",
    ),
    "bias of other rows": (lambda: call(layer(), bias=ones((3, 4, 5, 5))), r"bias.shape=\(3, 4, 5, 5\).*size 1"),
    "float mask": (lambda: call(layer(), mask=ones((2, 5))), r"mask.dtype=float32. One that is added.*goes to bias="),
    "bool bias": (lambda: call(layer(), bias=ones((5, 5), bool)), r"bias must be floating: bias.dtype=bool.*mask="),
    "bias of too many axes": (lambda: call(layer(), bias=ones((1, 1, 1, 5, 5))), r"bias.shape=\(1, 1, 1, 5, 5\)"),
    "tokens": (lambda: call(layer(), ones((2, 16), int)), r"x must be floating: x.dtype=int32. Embed tokens first"),
    "features of x": (
        lambda: call(layer(), ones((2, 5, 12))),
        r"x must be \[..., T, D\]: x.shape=\(2, 5, 12\), dim=16",
    ),
    "a flag of a call": (lambda: call(layer(), causal="no"), r"causal must be True or False: causal='no'"),
    "a mask as past": (
        lambda: call(layer(), ones((2, 5, 16)), ones((2, 5), bool)),
        r"past_key_value must be \(key, value\).*shapes=\(2, 5\)",
    ),
    "heads of the past": (
        lambda: call(layer(kv_heads=2), ones((2, 5, 16)), PAST),
        r"past_key_value must be .*shapes=\[\(2, 3, 4, 4\), .*kv_heads=2, head_dim=4",
    ),
    "dtype of the past": (
        lambda: call(layer(), ones((2, 5, 16)), tuple(x.astype(int) for x in PAST)),
        r"floating: shapes=.*dtypes=\['int32', 'int32'\]",
    ),
    "too few earlier keys": (
        lambda: call(layer(), prev_layer_key_value=PAST),
        r"last T positions of prev_layer_key_value, which has fewer: x.shape=\(2, 5, 16\), shapes=\[\(2, 3, 4, 4\)",
    ),
    "earlier values twice": (
        lambda: call(layer(), prev_layer_key_value=(ones((2, 5, 4, 4)),) * 2, inputs_v=ones((2, 5, 3))),
        r"are keys and values already, so there is no place for inputs_v",
    ),
    "rank of inputs_k": (
        lambda: call(layer(causal=False), inputs_k=ones((5, 16))),
        r"inputs_k must be floating \[..., S, features\].*inputs_k.shape=\(5, 16\)",
    ),
    "length of inputs_v": (
        lambda: call(layer(causal=False), inputs_k=ones((2, 7, 16)), inputs_v=ones((2, 6, 16))),
        r"inputs_v.shape=\(2, 6, 16\).*keys from \(2, 7, 16\)",
    ),
    "positions": (
        lambda: call(layer(), positions=ones((2, 1), int)),
        r"positions must be integers, one for each token.*positions.shape=\(2, 1\), expected \(2, 5\)",
    ),
    "positions dtype": (lambda: call(layer(), positions=ones(5)), r"positions must be integers.*dtype=float32"),
    "segments": (
        lambda: call(layer(), segment_ids=ones((2, 4), int)),
        r"segment_ids must be integers, one id .*segment_ids.shape=\(2, 4\), expected \(2, 5\)",
    ),
    "seq_lengths": (
        lambda: call(layer(), seq_lengths=np.array([7, 3])),
        r"between 0 and the tokens of the call: seq_lengths=\[7 3\], tokens=5",
    ),
    "seq_lengths of 64 bits": (lambda: call(layer(), seq_lengths=np.array([2**32 + 1, 3])), r"=\[4294967297 +3\]"),
    "negative seq_lengths": (lambda: call(layer(), seq_lengths=[-1, 3]), r"seq_lengths=\[-1  3\], tokens=5"),
    "seq_lengths as a mask": (
        lambda: call(layer(), seq_lengths=ones((2, 5), bool)),
        r"how many of the T tokens.*shape=\(2, 5\), expected \(2,\), .*dtype=bool. A mask of the tokens goes",
    ),
    "seq_lengths dtype": (lambda: call(layer(), seq_lengths=ones(2)), r"seq_lengths must be integers.*dtype=float32"),
    "seq_lengths of all rows": (lambda: call(layer(), seq_lengths=3), r"seq_lengths.shape=\(\), expected \(2,\)"),
    "seq_lengths and the past": (
        lambda: call(layer(), ones((2, 5, 16)), (), seq_lengths=np.array([3, 5])),
        r"past_key_value has keys of which they say nothing.*pass a mask .* or use a cache",
    ),
    "seq_lengths and inputs_k": (
        lambda: call(layer(causal=False), inputs_k=ones((2, 7, 16)), seq_lengths=np.array([3, 5])),
        r"inputs_k has keys of which they say nothing",
    ),
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
    "alibi": (lambda: layer(alibi="bloom"), r"alibi must be True, False or 'falcon': alibi='bloom'"),
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
    "scaling table": (
        lambda: mqa_jax.Rope(scaling=mqa_jax.TableScaling(factors=(1.0, 2.0, 3.0))).frequencies(8),
        "one factor for each pair of features: 3 factors, head_dim=8",
    ),
    "yarn": (
        lambda: mqa_jax.YarnScaling(factor=-1.0, original_max_position_embeddings=64),
        r"a positive factor and context: factor=-1\.0, original_max_position_embeddings=64",
    ),
    "slopes": (lambda: mqa_jax.alibi_slopes(0), r"alibi_slopes needs heads >= 1 .*: heads=0"),
    "slopes that rise": (lambda: mqa_jax.alibi_slopes(4, -8), r"alibi_bias_max > 0: heads=4, alibi_bias_max=-8"),
    "FlashAttention": (
        lambda: mqa_jax.FlashAttention().apply({}, *(ones((5, 8)),) * 3),
        r"FlashAttention takes q \[B, N, T, H\].*q.shape=\(5, 8\)",
    ),
}


SETTINGS: list[tuple[str, Any, str]] = [
    ("heads", "4", "an integer"),
    ("heads", True, "an integer"),
    ("dim", 16.0, "an integer"),
    ("head_dim", 0, "an integer from 1 on, or None"),
    ("head_dim", -8, "an integer from 1 on, or None"),
    ("kv_heads", 1.0, "an integer from 1 on, or None"),
    ("out_features", 0, "an integer from 1 on, or None"),
    ("clip_qkv", -1.0, "a finite number from 0 on, or None"),
    ("softmax_scale", float("nan"), "a finite number, or None"),
    ("softmax_scale", "0.1", "a finite number, or None"),
    ("attn_pdrop", 1.5, "a number from 0 to 1"),
    ("norm_eps", -1e-5, "a finite number from 0 on"),
    ("logits_soft_cap", 0.0, "a finite number above 0, or None"),
    ("alibi_bias_max", 0, "a finite number above 0"),
    ("alibi", 1, "True, False or 'falcon'"),
    ("causal", "no", "True or False"),
    ("qk_ln", 1, "True or False"),
    ("use_bias", None, "True or False"),
    ("deterministic", 0, "True or False, or None"),
    ("verbose", "very", "a number or a flag"),
    ("rope", True, "positions such as mqa_jax.Rope(), or None"),
    ("rope", mqa_jax.Rope, "positions such as mqa_jax.Rope(), or None"),
    ("attn_temperature_tuning", 2.0, "such as mqa_jax.TemperatureTuning(), or None"),
    ("dtype", "int32", "a floating dtype, or None"),
    ("dtype", "float31", "a floating dtype, or None"),
    ("param_dtype", None, "a floating dtype"),
    ("kernel_init", 0.02, "a function"),
]
OTHERS: list[tuple[Callable, dict[str, Any], str]] = [
    (mqa_jax.FlashAttention, dict(dropout=-0.1), "dropout must be a number from 0 to 1"),
    (mqa_jax.FlashAttention, dict(causal="yes"), "causal must be True or False"),
    (mqa_jax.FlashMHA, dict(embed_dim=16, num_heads="4"), "num_heads must be an integer from 1 on"),
    (mqa_jax.FlashMHA, dict(embed_dim=0, num_heads=4), "embed_dim must be an integer from 1 on"),
    (mqa_jax.FlashMHA, dict(embed_dim=16, num_heads=4, dtype="int8"), "dtype must be a floating dtype, or None"),
    (mqa_jax.Rope, dict(theta=0.0), "theta must be a finite number above 0"),
    (mqa_jax.Rope, dict(scaling=2.0), "scaling must be such as mqa_jax.LinearScaling"),
    (mqa_jax.LinearScaling, dict(factor=0), "factor must be a finite number above 0"),
    (mqa_jax.TemperatureTuning, dict(floor_scale=0), "floor_scale must be a finite number above 0"),
]


@pytest.mark.parametrize(("name", "value", "rule"), SETTINGS, ids=str)
def test_each_setting_by_itself(name, value, rule):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {rule}: {name}={value!r}")):
        mqa_jax.GroupedQueryAttention(**{"dim": 16, "heads": 4, name: value})


@pytest.mark.parametrize(("make", "settings", "rule"), OTHERS, ids=str)
def test_each_setting_of_the_others(make, settings, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        make(**settings)


def cached(module=None, max_length=8, **options):
    """A module that is given 5 tokens and has room for max_length."""
    module = layer() if module is None else module
    x = ones((2, 5, 16))
    params = module.init(RNG, x)["params"]
    cache = options.pop("cache", None) or mqa_jax.init_cache(module, 2, max_length, x)
    mutable = options.pop("mutable", ["cache"])
    return module.apply({"params": params, "cache": cache}, options.pop("x", x), mutable=mutable, **options)


def changed(**arrays):
    """The cache of a module with other arrays, None for none."""
    cache = {**layer().init_cache(2, 8), **arrays}
    return {name: x for name, x in cache.items() if x is not None}


STACKED = {"layers": jax.tree.map(lambda x: jnp.stack([x] * 3), layer().init_cache(2, 8))}
CACHE = {
    "overflow": (
        lambda: cached(max_length=4),
        r"cache is full: cache_index=\[5 5\] after this call, max_length=4. Make a longer cache .* reset_cache",
    ),
    "batch": (lambda: cached(x=ones((3, 5, 16))), r"another batch: x.shape=\(3, 5, 16\), cache .*=\(2, 8, 4, 4\)"),
    "heads": (
        lambda: cached(cache=layer(kv_heads=2).init_cache(2, 8)),
        r"New keys must fit the cache .*=\(2, 8, 2, 4\): key.shape=\(2, 5, 4, 4\)",
    ),
    "rank": (lambda: cached(x=ones((5, 16))), r"With a cache x must be \[batch, T, D\]: x.shape=\(5, 16\)"),
    "inputs_k too": (lambda: cached(inputs_k=ones((2, 5, 16))), r"got a cache and inputs_k"),
    "empty": (lambda: layer().init_cache(0, 8), r"one row and one position, both integers: batch=0, max_length=8"),
    "batch of a float": (lambda: layer().init_cache(2.0, 8), r"both integers: batch=2.0, max_length=8"),
    "length of a flag": (lambda: layer().init_cache(2, True), r"both integers: batch=2, max_length=True"),
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
    "not mutable": (lambda: cached(mutable=[]), r"cannot be written: pass mutable=\['cache'\] to apply"),
    "another module's": (
        lambda: cached(cache={"attention": layer().init_cache(2, 8)}),
        r"no cache for this module: path=\(\), the collection has \['attention'\]. Make it with mqa_jax.init_cache",
    ),
    "no values": (lambda: cached(cache=changed(cached_value=None)), r"no cache of an attention module .*init_cache"),
    "no scales": (
        lambda: cached(cache={name: x for name, x in layer().init_cache(2, 8, "int8").items() if "scale" not in name}),
        r"no cache of an attention module .*'cached_key': 'int8'",
    ),
    "two indices": (lambda: cached(cache=changed(ring_index=ones(2, int))), r"no cache .*'ring_index': \(2,\)"),
    "one index": (lambda: cached(cache=changed(cache_index=jnp.int32(0))), r"no cache .*'cache_index': \(\)"),
    "index dtype": (lambda: cached(cache=changed(cache_index=ones(2))), r"no cache .*'cache_index': 'float32'"),
    "cached integers": (
        lambda: cached(cache=changed(cached_key=ones((2, 8, 4, 4), int))),
        r"cached as one of .*: dtype=int32",
    ),
    "spoiled": (
        lambda: cached(cache=changed(cache_index=-ones(2, int))),
        r"worthless: cache_index=\[-1 -1\].*reset_cache",
    ),
    "unknown dtype": (lambda: layer(cache_dtype="floaty"), r"cached as one of .*: dtype='floaty'"),
    "columns of a mask": (
        lambda: cached(mask=ones((2, 5), bool)),
        r"static cache mask has a column for each of its positions: mask.shape=\(2, 1, 1, 5\), max_length=8. Pad it",
    ),
    "rows of a table": (
        lambda: (
            cached(layer(cache_layout="ring", local_window_size=3), x=ones((2, 3, 16)), bias=ones((1, 4, 5, 9)))[1]
            and cached(
                cache=changed(cache_index=np.array([4, 0], np.int32)), x=ones((2, 3, 16)), bias=ones((1, 4, 5, 9))
            )
        ),
        r"one for each position.*positions=\[7 3\] after this call, rows=5. Make it longer",
    ),
    "stacked": (
        lambda: mqa_jax.reorder_cache(STACKED, np.array([1, 0])),
        r"Layers are stacked .*cache_index'\]\": \(3, 2\).*batch_axis=None. It is 1 where nn.scan has",
    ),
    "stacked, another axis": (lambda: mqa_jax.reset_cache(STACKED, ones(2, bool), batch_axis=2), r"batch_axis=2"),
    "stacked, the layers": (
        lambda: mqa_jax.reorder_cache(STACKED, np.array([1, 0]), batch_axis=0),
        r"rows must be integer \[batch\].*rows.shape=\(2,\), batch=3",
    ),
    "reorder: outside": (
        lambda: mqa_jax.reorder_cache(changed(), np.array([0, 2])),
        r"rows of the cache, 0 to 1: rows=\[0 2\]",
    ),
    "reorder: negative": (lambda: mqa_jax.reorder_cache(changed(), np.array([0, -1])), r"rows=\[ 0 -1\]"),
    "reorder: bool": (lambda: mqa_jax.reorder_cache(changed(), ones(2, bool)), r"rows must be integer .*dtype=bool"),
    "reorder: axes": (lambda: mqa_jax.reorder_cache(changed(), ones((2, 1), int)), r"rows.shape=\(2, 1\), batch=2"),
    "reorder: length": (lambda: mqa_jax.reorder_cache(changed(), np.array([0, 1, 1])), r"rows.shape=\(3,\), batch=2"),
    "reset: length": (lambda: mqa_jax.reset_cache(changed(), ones(1, bool)), r"rows.shape=\(1,\), batch=2"),
    "reset: others": (
        lambda: mqa_jax.reset_cache({"a": changed(), "b": {"state": ones((2, 3))}}, ones(2, bool)),
        r"How \['b'\]\['state'\] starts anew is not known here.*shape=\(2, 3\)",
    ),
    "reorder: others": (
        lambda: mqa_jax.reorder_cache({"a": changed(), "step": jnp.int32(1)}, np.array([1, 0])),
        r"\['step'\] is no array of an attention module, and its batch axis is not found: shape=\(\), batch=2",
    ),
    "two batches": (
        lambda: mqa_jax.reorder_cache([changed(), layer().init_cache(3, 8)], np.array([1, 0])),
        r"caches of one batch have the same rows: rows=.*: 2.*: 3",
    ),
    "no cache in it": (lambda: mqa_jax.cache_bytes({"params": ones(3)}), r"no cache of an attention module.*params"),
    "check": (
        lambda: mqa_jax.check_cache([changed(cache_index=np.array([0, 9], np.int32))]),
        r"cache_index=\[0 9\].*max_length=8",
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
    "config: layer": (
        lambda: hf_attention.attention_of(dict(model_type="llama", num_hidden_layers=2), -1),
        r"numbered from 0 to num_hidden_layers - 1: layer=-1, num_hidden_layers=2",
    ),
    "config: layers": (
        lambda: hf_attention.layers_of(dict(model_type="llama")),
        r"does not have the number of layers: num_hidden_layers=None",
    ),
    "layouts of one name": (
        lambda: torch_interop.from_state_dict(
            {"c_attn.weight": np.ones((24, 8)), "c_proj.weight": np.ones((8, 8))}, heads=2
        ),
        r"Several layouts have a c_attn.weight of shape \(24, 8\).*layout='gpt_bigcode' or 'nanogpt'",
    ),
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
        r"SimpleNamespace does not declare its number of heads: heads=None. Pass heads=, and kv_heads=",
    ),
    "dtype to compare in": (
        lambda: parity.tolerance_of("float64"),
        r"compared in one of \['float32', 'bfloat16', 'float16'\]: dtype='float64'. Cast the layer",
    ),
    "nothing to plot": (
        lambda: parity.Report(()).plot(Path("nowhere.png")),
        r"There is nothing to plot: this torch layer has no single output projection",
    ),
    "another module": (
        lambda: torch_modules.to_torch(
            mqa_jax.MultiQueryAttention(8, 2),
            {"params": convert(_state())},
            like=SimpleNamespace(state_dict=lambda: _state(dim=4)),
        ),
        r"do not fit SimpleNamespace; Flax and torch shapes: \{'Wqkv.weight': \(\(16, 8\), \(8, 4\)\)",
    ),
    "a module with other heads": (
        lambda: torch_modules.to_torch(
            mqa_jax.MultiQueryAttention(8, 2), {}, like=SimpleNamespace(state_dict=_state, n_heads=4)
        ),
        r"SimpleNamespace has other heads than the Flax module: \{'heads': 4\} instead of \{'heads': 2, 'kv_heads'",
    ),
    "no keys to write": (
        lambda: torch_interop.to_state_dict({"query": {"kernel": np.ones((8, 2, 4))}}, layout="fused"),
        r"found \['query'\], expected \['key', 'out', 'query', 'value'\] and optionally \['k_ln', 'q_ln'\]",
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
        lambda: gpu.assuming("sm70").__enter__(),
        r"architecture must be one of \('sm80', 'sm89', 'sm90', 'sm100'\): architecture='sm70'",
    ),
    "no entry in the table": (
        lambda: tile_config.choose("sideways", inputs_of(QUERY, KEY, KEY)),
        r"no tiles for direction='sideways', dtype='float32', .*, head_dim=8. `python -m benchmarks.tune`",
    ),
}

MODULES["adapter: added mask"] = (
    lambda: mqa_jax.attention_fn(QUERY, QUERY, QUERY, mask=-1e9 * ones((5, 5))),
    r"bool, or 0 and 1, 0 hides: mask.dtype=float32.*goes to bias=",
)
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


mha = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4, attention_fn=mqa_jax.attention_fn)
grad = functools.partial(jax.grad, argnums=0)

NOT_POSSIBLE: dict[str, Any] = {
    "torch: packed": (
        lambda: torch_interop.from_state_dict({"q_proj._packed_params": (1, 2)}, heads=2),
        r"Only arrays are read, not packed weights: q_proj._packed_params is a tuple",
    ),
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
    "config: a field that nobody reads": (
        lambda: hf_attention.attention_of(
            dict(model_type="bert", hidden_size=8, num_attention_heads=2, position_embedding_type="relative_key")
        ),
        r"not read here for model_type='bert': position_embedding_type='relative_key'. Set up GroupedQueryAttention",
    ),
    "config: rope": (
        lambda: hf_attention.rope_of(dict(rope_scaling=dict(type="dynamic", factor=2.0))),
        r"RoPE scaling is one of \['default', 'linear', 'llama3', 'yarn'\]: rope_type='dynamic'",
    ),
    "falcon's ALiBi": (
        lambda: layer(alibi="falcon", cache_layout="ring", local_window_size=3),
        r"the slots of a ring buffer are not in: alibi='falcon', alibi_bias_max=8, cache_layout='ring'",
    ),
    "config: mpt": (
        lambda: hf_attention.attention_of(
            dict(model_type="mpt", d_model=8, n_heads=2, attn_config=dict(qk_ln=True, alibi_bias_max=4))
        ),
        r"transformers ignores these settings of MPT: attn_config=\{'alibi_bias_max': 4, 'qk_ln': True\}",
    ),
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


@needs_modes
@pytest.mark.torch
def test_no_error_is_missing_from_these_tables():
    """Every `raise` of the package is reached by one of them."""
    package = Path(mqa_jax.__file__).parent
    written = {
        (str(path), node.lineno)
        for path in [*package.rglob("*.py"), *(package / "kernels").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        # Those of commands and of Python's own protocols are in their own tests.
        if isinstance(node, ast.Raise) and not re.search("SystemExit|AttributeError", ast.unparse(node))
    }
    assert written - _raised() == set()


def _raised() -> set[tuple[str, int | None]]:
    """Where the tables raise: file and line of each frame."""
    places = set()
    on_disk = test_hf_checkpoint.WRONG | test_hf_checkpoint.NEEDS_TORCH
    live = [
        *test_torch_modules.REFUSED,
        *(functools.partial(test_torch_modules.spoiled, x) for x in test_torch_modules.ODD),
    ]
    live += [
        functools.partial(test_torch_interop.from_state, *case) for case in test_torch_interop.WRONG_STATES.values()
    ]
    configs = [
        (functools.partial(hf_attention.attention_of, config),) for config, *_ in test_hf_attention.FIELDS.values()
    ]
    tables = [*VALUE_ERRORS.values(), *NOT_POSSIBLE.values(), *map(_in_a_folder, on_disk.values()), *configs]
    tables += [*MISTAKES.values(), (functools.partial(through_the_bridge, tree=True),)]
    tables += [(wrong,) for wrong in [*live, test_torch_interop.on_no_device]]
    for wrong, *_ in tables:
        try:
            wrong()
        except (ValueError, NotImplementedError, OSError, ImportError) as error:
            places |= {(str(Path(f.filename)), f.lineno) for f in traceback.extract_tb(error.__traceback__)}
    return places


def _in_a_folder(case: tuple) -> tuple[Callable[[], object]]:
    def wrong() -> object:
        with tempfile.TemporaryDirectory() as folder:
            return case[0](Path(folder)).attention(0)

    return (wrong,)
