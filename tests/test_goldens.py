"""Every reference vector of the original projects: outputs, caches, weights and all gradients."""

import json

import golden_modules
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_modules import FOLDER, Golden

import mqa_jax

OUTPUT_TOLERANCE = 1e-5  # absolute
GRADIENT_TOLERANCE = 1e-4  # absolute, or GRADIENT_SHARE of the largest entry
GRADIENT_SHARE = 1e-5

# Vectors that show what we decided against. Nothing in them is compared.
EXCLUDED = {
    "fa_flash_causal_sq_lt_sk": "top-left causal alignment; ours is bottom-right, as fa_noflash_causal_sq_lt_sk",
    "fa_flash_causal_sq_gt_sk": "top-left causal alignment; ours is bottom-right, as fa_noflash_causal_sq_gt_sk",
    "fa_noflash_mask_ignored": "upstream ignores the mask; ours combines mask, bias and causality always",
    "fahead_causal_context": "upstream shifts the causal mask the wrong way, with gradients that depend on its tiles",
    "mqa_mqa_patched_qk_ln_rmsnorm": "upstream's rmsnorm is a LayerNorm; ours is foundry_gqa_qk_ln_rmsnorm's",
}
# The flashmha_whl_* vectors are not even stored: a softmax over heads instead of positions.

# Vectors with rows that may attend to nothing: upstream averages the values there (or gives NaN), ours gives 0. The
# other rows are compared; gradients are not, because upstream's empty rows contribute to them.
EMPTY_ROWS = {
    "fa_flash_mask_bias_fullrow": lambda g: ~g.arrays["in/mask"].any(-1),
    "fa_noflash_causal_sq_gt_sk": lambda g: _before_first_key(g, rows=2, keys=2),
    "foundry_gqa_padmask": lambda g: _unseen(g.arrays["in/am"] if "in/am" in g.arrays else g.arrays["in/mask"]),
    "knot_attn_2d_fullymasked_nan": lambda g: ~(g.arrays["in/mask"] != 0).any(-1),
    "mqa_mha_padmask_left_fullrows": lambda g: _unseen(g.arrays["in/mask"]),
    "mqa_mqa_padmask_left_fullrows": lambda g: _unseen(g.arrays["in/mask"]),
    "mqa_mha_padmask_noncausal_onefull": lambda g: _unseen(g.arrays["in/mask"], causal=False),
    "mqa_mqa_padmask_noncausal_onefull": lambda g: _unseen(g.arrays["in/mask"], causal=False),
}
# As above, but the rows have a different, real value: upstream's stub of flash-attn gives padded queries no attention.
OTHER_ROWS = {"mqa_mqa_emulflash_padmask_right": lambda g: ~g.arrays["in/mask"]}

NAMES = sorted(
    path.stem for path in FOLDER.glob("*.npz") if path.stem != "mqa_helpers" and path.stem[:3] != "hf_"
)  # see test_hf_attention


def _unseen(mask: np.ndarray, causal: bool = True) -> np.ndarray:
    """Queries [b, t] that see no key of a key padding mask [b, s]."""
    seen = np.logical_or.accumulate(mask, axis=1) if causal else np.broadcast_to(mask.any(1, keepdims=True), mask.shape)
    return ~seen


def _before_first_key(golden: Golden, rows: int, keys: int) -> np.ndarray:
    lengths = golden.arrays["in/q"].shape[rows], golden.arrays["in/k"].shape[keys]
    return np.arange(lengths[0]) < lengths[0] - lengths[1]


def _run_with_gradients(golden: Golden):
    """Outputs, and gradients of sum(out * ct) with respect to weights and inputs, under torch's names."""
    weights, inputs = golden.group("w/"), golden.group("in/")
    differentiated = {name: inputs[name] for name in golden.meta["grad_inputs"]}

    def loss(weights, differentiated):
        outputs = golden_modules.run(golden, weights, inputs | differentiated)
        cotangent = golden.arrays.get("ct/out", 1.0)  # vectors with NaN have outputs only
        return jnp.sum(outputs["out"] * cotangent), outputs

    gradients, outputs = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(weights, differentiated)
    return outputs, gradients


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXCLUDED])
def test_golden(name):
    golden = golden_modules.load(name)
    outputs, (weight_gradients, input_gradients) = _run_with_gradients(golden)
    rows = {**EMPTY_ROWS, **OTHER_ROWS}.get(name)
    skipped = np.zeros((), bool) if rows is None else rows(golden)
    expected = golden.group("out/")
    assert {k for k, v in outputs.items() if v is not None} >= set(expected)
    _compare("out", outputs["out"], expected["out"], skipped)
    for output in set(expected) - {"out"}:
        actual = outputs[output]
        if golden.meta["ctor"].get("add_bias_kv") or golden.meta["ctor"].get("add_zero_attn"):
            expected[output] = expected[output][..., :-1]  # torch also returns the weight of the added key
        if output == "attn_weights" and rows is not None:
            actual = np.where(_rows_of_weights(skipped, actual), expected[output], actual)
        np.testing.assert_allclose(actual, expected[output], atol=OUTPUT_TOLERANCE, rtol=0, err_msg=output)
    if name in EMPTY_ROWS:
        _assert_no_context(golden, outputs["out"], skipped)
    if rows is None:
        _compare_gradients(golden.group("gw/"), weight_gradients)
        _compare_gradients(golden.group("gin/"), input_gradients)


def _rows_of_weights(skipped, weights):
    return np.broadcast_to(skipped[:, None, :, None], weights.shape)


def _compare(name, actual, expected, skipped):
    actual = np.where(np.expand_dims(skipped, -1), expected, actual)  # rows are the last axis but one
    np.testing.assert_allclose(actual, expected, atol=OUTPUT_TOLERANCE, rtol=0, err_msg=name)


def _assert_no_context(golden, out, empty):
    bias = golden.arrays.get("w/out_proj.bias", np.zeros(1, np.float32))
    assert empty.any()
    rows = np.broadcast_to(empty, out.shape[:-1])
    np.testing.assert_array_equal(np.asarray(out)[rows], np.broadcast_to(bias, out.shape)[rows])


def _compare_gradients(expected, actual):
    for name, gradient in expected.items():
        allowed = max(GRADIENT_TOLERANCE, GRADIENT_SHARE * np.abs(gradient).max(initial=0))
        np.testing.assert_allclose(actual[name], gradient, atol=allowed, rtol=0, err_msg=name)


def test_every_vector_is_compared_or_excluded_with_a_reason():
    assert set(EXCLUDED) | set(EMPTY_ROWS) | set(OTHER_ROWS) <= set(NAMES)
    assert len(NAMES) == 148


def test_a_wrong_weight_is_noticed():
    golden = golden_modules.load("mqa_mqa_causal")
    golden.arrays["w/Wqkv.weight"] = golden.arrays["w/Wqkv.weight"][::-1].copy()
    outputs, _ = _run_with_gradients(golden)
    with pytest.raises(AssertionError):
        _compare("out", outputs["out"], golden.arrays["out/out"], np.zeros((), bool))


def test_helpers_of_mqa():
    """Slopes and ALiBi as upstream builds them. Its `attn_bias_shape` describes an array that we never build."""
    golden = golden_modules.load("mqa_helpers")
    assert json.dumps(golden.meta["attn_bias_shape"])
    for name, slopes in golden.group("slopes/").items():
        heads, bias_max = int(name[1 : name.index("_")]), 9 if name.endswith("b") else 8
        np.testing.assert_allclose(mqa_jax.alibi_slopes(heads, bias_max), slopes.reshape(-1), rtol=1e-6)
    query = jnp.zeros((1, 7, 1, 4))
    for heads in (1, 2, 3, 5, 6, 8, 12):
        bias = golden.arrays[f"alibi/full_h{heads}_s7"]
        many = jnp.broadcast_to(query, (1, 7, heads, 4))
        with_bias = mqa_jax.dot_product_attention(many, query, query, bias, return_residual=True)
        with_slopes = mqa_jax.dot_product_attention(
            many, query, query, alibi_slopes=mqa_jax.alibi_slopes(heads), return_residual=True
        )
        np.testing.assert_allclose(with_slopes[1], with_bias[1], atol=1e-6)
