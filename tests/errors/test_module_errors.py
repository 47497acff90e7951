"""What modules, and Flax's own with our adapter, refuse."""

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from wrong_calls import KEY, QUERY, RNG, call, layer, ones, refused

import mqa_jax

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
    "no mesh": (
        lambda: _applied(layer(sequence_axis="seq")),
        r"a mesh, and neither jax.set_mesh nor x have one: sequence_axis='seq', x.shape=\(2, 5, 16\)",
    ),
    "sequence_axis": (lambda: layer(sequence_axis=3), r"name of a mesh axis, .* or None: sequence_axis=3"),
    "batch_axis": (lambda: mqa_jax.SequenceAxis("s", batch_axis=()), r"mqa_jax.SequenceAxis with .*: batch_axis=\(\)"),
    "strategy": (lambda: mqa_jax.SequenceAxis("s", strategy="rings"), r"Unknown strategy='rings': use one of"),
    "FlashAttention": (
        lambda: mqa_jax.FlashAttention().apply({}, *(ones((5, 8)),) * 3),
        r"FlashAttention takes q \[B, N, T, H\].*q.shape=\(5, 8\)",
    ),
    "adapter: added mask": (
        lambda: mqa_jax.attention_fn(QUERY, QUERY, QUERY, mask=-1e9 * ones((5, 5))),
        r"bool, or 0 and 1, 0 hides: mask.dtype=float32.*goes to bias=",
    ),
}


def _applied(module):
    params = jax.eval_shape(module.init, RNG, ones((2, 5, 16)))
    return jax.eval_shape(module.apply, params, ones((2, 5, 16)))


@pytest.mark.parametrize("name", MODULES)
def test_wrong_calls(name):
    refused(ValueError, MODULES[name])


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


mha = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4, attention_fn=mqa_jax.attention_fn)
NOT_POSSIBLE: dict[str, Any] = {
    "falcon's ALiBi": (
        lambda: layer(alibi="falcon", cache_layout="ring", local_window_size=3),
        r"the slots of a ring buffer are not in: alibi='falcon', alibi_bias_max=8, cache_layout='ring'",
    ),
    "batch_first": (
        lambda: mqa_jax.FlashMHA(16, 4, batch_first=False).init(RNG, ones((2, 5, 16))),
        r"batch_first=False is not supported: swap the first two axes",
    ),
    "bias_kv and dropout": (
        lambda: layer(add_bias_kv=True, attn_pdrop=0.1),
        r"add_bias_kv works without dropout and soft cap only: attn_pdrop=0.1",
    ),
    "bias_kv and score_fn": (
        lambda: layer(add_bias_kv=True).init(RNG, ones((2, 5, 16)), score_fn=lambda score, *_: score),
        r"add_bias_kv works without score_fn only: its key has no position",
    ),
    "cache in zigzag order": (
        lambda: layer(sequence_axis=mqa_jax.SequenceAxis("seq", order="zigzag")).init_cache(2, 7),
        r"positions in their order: sequence_axis=.*order='zigzag'.*module with order='contiguous' has the same param",
    ),
    "ring buffer of a cut sequence": (
        lambda: layer(sequence_axis="seq", cache_layout="ring", local_window_size=3).init_cache(2, 7),
        r"cannot be cut over devices: cache_layout='ring', sequence_axis='seq'. A module with cache_layout='static'",
    ),
    "past and weights of a cut sequence": (
        lambda: call(layer(sequence_axis=("a", "b")), ones((2, 5, 16)), PAST, needs_weights=True),
        r"combined with past_key_value and .*needs_weights=True: sequence_axis=\('a', 'b'\)",
    ),
    "more earlier keys of a cut sequence": (
        lambda: call(layer(sequence_axis="seq"), prev_layer_key_value=(ones((2, 7, 4, 4)),) * 2),
        r"combined with prev_layer_key_value with more tokens than x: sequence_axis='seq'",
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
def test_what_modules_cannot_do(name):
    refused(NotImplementedError, NOT_POSSIBLE[name])
