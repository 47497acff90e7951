"""What the function refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_calls import KEY, QUERY, RNG, attend, ones, refused

import mqa_jax

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


@pytest.mark.parametrize("name", FUNCTION)
def test_wrong_calls(name):
    refused(ValueError, FUNCTION[name])
