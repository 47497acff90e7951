"""Faults put into the terms of tangents."""

from mutant import Mutant

# -- the terms of tangents in plain XLA -------------------------------------------------------------------------------

_MOVED_BY_XLA = "test_xla_tangent.test_everything_at_once"

XLA_TANGENT = [
    Mutant("xla.tangent.tangent_in_tiles", "weighted - mean[..., None]", "weighted + mean[..., None]", _MOVED_BY_XLA),
    Mutant(
        "xla.tangent.tangent_in_tiles",
        "weighted - mean[..., None] * out.astype(weighted.dtype)",
        "weighted",
        _MOVED_BY_XLA,
    ),
    Mutant(
        "xla.tangent.tangent_in_tiles",
        " + row_terms.moved_by_sinks(inputs.operands.sinks, tangents.sinks, normalizer)",
        "",
        _MOVED_BY_XLA,
    ),
    Mutant("row_terms.moved_by_sinks", "_weight_of_sinks(sinks, normalizer) * ", "", _MOVED_BY_XLA),
    Mutant("xla.tangent.add_tile", "drop(tiling, by_score, place)", "by_score", _MOVED_BY_XLA),
    Mutant("xla.tangent.add_tile", "drop(tiling, weight, place)", "weight", _MOVED_BY_XLA),
    Mutant("xla.tangent.add_tile", "jnp.sum(by_score", "jnp.sum(drop(tiling, by_score, place)", _MOVED_BY_XLA),
    Mutant("xla.tangent.add_tile", "if tangents.value is not None", "if False", _MOVED_BY_XLA),
    Mutant("xla.tangent.add_tile", "if d_score is not None", "if False", _MOVED_BY_XLA),
    Mutant(
        "xla.tangent.moved_scores",
        "if may_attend is not None",
        "if False",
        "test_xla_tangent.test_hidden_keys_may_hold_anything",
    ),
    Mutant("xla.tangent.moved_scores", " * tiling.inputs.scale", "", _MOVED_BY_XLA),
    Mutant("xla.tangent.moved_scores", "d_score * factor", "d_score", _MOVED_BY_XLA),
    Mutant("xla.scores.slope", "1 - steps.tanh**2", "1 - steps.tanh", _MOVED_BY_XLA),
    Mutant("xla.tangent.moved_scores", "if tangents.bias is not None", "if False", _MOVED_BY_XLA),
    Mutant("xla.tangent.moved_scores", "if tangents.alibi_slopes is not None", "if False", _MOVED_BY_XLA),
    Mutant("xla.tangent.moved_scores", "-tiling.heads(", "tiling.heads(", _MOVED_BY_XLA),
]

# -- the terms of tangents in Triton ----------------------------------------------------------------------------------

_MOVED_BY_TRITON = "test_triton_tangent.test_everything_at_once"

TRITON_TANGENT = [
    Mutant("triton.tangent._one_tile", "(d_query, key), (query, d_key)", "((d_query, key),)", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "(d_query, key), (query, d_key)", "((query, d_key),)", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "dropped * d_score", "weight * d_score", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "jnp.sum(weight * d_score", "jnp.sum(dropped * d_score", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "tangents.value is not None", "False", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "d_out, dropped, d_value", "d_out, weight, d_value", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "x - sums", "x + sums", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "visits.full, ", "visits.full - 1, ", _MOVED_BY_TRITON),
    Mutant("triton.tangent._one_tile", "visits.masked, ", "visits.masked - 1, ", _MOVED_BY_TRITON),
    Mutant(
        "triton.tangent._one_tile",
        "sums: step(number, sums, masked=True)",
        "sums: step(number, sums, masked=False)",
        _MOVED_BY_TRITON,
    ),
    Mutant("triton.tangent._d_score", "d_raw * program.inputs.scale", "d_raw", _MOVED_BY_TRITON),
    Mutant("triton.tangent._d_score", "d_raw * (1 - tanh * tanh)", "d_raw", _MOVED_BY_TRITON),
    Mutant("triton.tangent._d_score", "tangents.bias is not None", "False", _MOVED_BY_TRITON),
    Mutant("triton.tangent._d_score", "-slope * ", "slope * ", _MOVED_BY_TRITON),
    Mutant("triton.tangent._d_log_sum_exp_of_sinks", "saved.of_sinks is None", "True", _MOVED_BY_TRITON),
    Mutant("triton.scores.load_normalizer", "other=-jnp.inf", "other=0.0", _MOVED_BY_TRITON),
    Mutant("row_terms.moved_by_sinks", "_weight_of_sinks(sinks, normalizer) * ", "0 + ", _MOVED_BY_TRITON),
]
