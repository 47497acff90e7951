"""Faults put into the kernels' source, each of which a call on an emulated GPU notices: `--kinds mutants`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mutants
from emulated_cases import OPTIONS, Case, Options, Tangents, everything, sizes
from mutants import Mutant
from ptx_emulator import emulation

step: Options = lambda rng: dict(
    is_causal=True,
    query_offset=jnp.array([640, 2]),
    key_value_seq_lengths=jnp.array([641, 3]),
    sinks=jnp.asarray([0.5, 1, 2, 3, 0, -1], jnp.float32),
)
_WHOLE: dict[str, Any] = sizes(97, 131, (6, 2), 64, batch=2)
CALLS = {
    "causal": Case("causal", "bfloat16", sizes(150, 203, (2, 1), 64), OPTIONS["causal"]),
    "ragged": Case("ragged", "bfloat16", sizes(37, 67, (2, 1), 80)),
    "windows": Case("windows", "bfloat16", sizes(150, 303, (2, 1), 64), lambda rng: dict(local_window_size=(170, 120))),
    "odd heads": Case("odd heads", "bfloat16", sizes(37, 67, (2, 1), 40)),
    "large heads": Case("large heads", "bfloat16", sizes(113, 203, (2, 1), 256)),
    "step": Case("step", "bfloat16", sizes(1, 1003, (6, 2), 64, batch=2), step, gradients=False),
    "step in 8 bits": Case("step", "bfloat16", sizes(1, 1003, (6, 2), 64), gradients=False, bits="int8"),
    "everything": Case("everything", "bfloat16", _WHOLE, everything(97, 131)),
    "tangents": Tangents("everything", "bfloat16", sizes(97, 131, (2, 1), 64, batch=2), everything(97, 131, heads=2)),
    **{
        name: Case(name, "bfloat16", _WHOLE, OPTIONS[name])
        for name in ("rows that see nothing", "segments", "mask", "bias", "slopes", "soft cap", "sinks", "dropout")
    },
}


class Noticed(NamedTuple):
    """`call` is one of `CALLS`; `gpus` are those whose kernels have the code in question."""

    function: str
    old: str
    new: str
    call: str
    gpus: tuple[str, ...] = emulation.GPUS

    def __str__(self) -> str:
        return f"{self.function}: {self.old} -> {self.new or 'nothing'}"

    def judge(self) -> None:
        """Raises where the fault stays unnoticed, or where the call fails before anything was executed."""
        with mutants.applied(Mutant(self.function, self.old, self.new, "")):
            try:
                CALLS[self.call].judge("triton")
            except AssertionError:  # the oracle's
                return
            except jax.errors.JaxRuntimeError as error:  # what is raised while a program runs
                if "KernelFault" in str(error):
                    return
                raise
        raise AssertionError(f"nobody notices, in {CALLS[self.call]}")


DEFERS = ("h100",)  # the values of a step: `TileConfig.defer_values`

# Left out: `highest > -inf` in triton.forward.finish, which matters only where hidden values are not finite.
MUTANTS = [
    # The running softmax.
    Noticed("triton.forward.attend", "state.total * rescale", "state.total", "causal"),
    Noticed("triton.forward.attend", "x * rescale[:, None] for x", "x for x", "causal", DEFERS),
    Noticed("triton.forward.attend", "x * rescale[:, None] + product", "x + product", "causal", ("a100", "l40s")),
    Noticed("triton.forward.attend", "jnp.sum(weight, ", "jnp.sum(drop(program, weight, place), ", "dropout"),
    Noticed("triton.forward.finish", "part == 0", "part >= 0", "step"),
    Noticed("triton.forward.finish", "x * factor", "x", "ragged"),
    Noticed("triton.merge.merge", " + log_totals", "", "step"),
    Noticed("triton.merge.merge", "weights[:, None] * found", "found", "step"),
    # Which tiles, and in which order.
    Noticed("triton.forward.attend", "visits.previous(", "visits.tile(", "causal", DEFERS),
    Noticed("triton.grid.over_query_tiles", "tiles - 1 - program_id(1)", "tiles - program_id(1)", "causal"),
    Noticed("triton.grid.over_query_tiles", "tiles - 1 - program_id(1)", "jnp.int32(0)", "causal"),
    Noticed("triton.grid.Visits.tile", "self.full_start + step", "self.start", "large heads"),
    Noticed("triton.grid.Visits.tile", "self.full_stop + step - ", "self.full_start + step - ", "causal"),
    Noticed("triton.grid.Visits.masked", "self.left + ", "", "windows"),
    Noticed("triton.grid.Share.range", "part(self.number + 1)", "part(self.number + 1) - 1", "causal"),
    Noticed("triton.backward._one_tile_of_d_key", "program.head + head", "program.head", "causal"),
    Noticed("triton.backward._one_tile_of_d_key", "tiles * size.G", "tiles", "causal"),
    # Terms of the mask.
    Noticed("triton.mask.visible", "mask.is_causal or mask.window is not None", "False", "causal"),
    Noticed("triton.mask.visible", "_row_segments(program, place) ==", "_row_segments(program, place) <=", "segments"),
    Noticed("triton.mask.visible", "mask.allowed is not None", "False", "mask"),
    Noticed("triton.mask.visible", "program.ragged_columns()", "False", "ragged"),
    Noticed("triton.mask.query_positions", " + _query_offset(program)", "", "rows that see nothing"),
    # Guards of loads and stores.
    Noticed("triton.io._load_tile", "tile, limit, piece", "tile, None, piece", "ragged"),
    Noticed("triton.io.store_rows", "program.sizes.T, leading", "program.config.rows, leading", "ragged"),
    Noticed("triton.io.store_columns", "program.sizes.S, leading", "program.config.columns, leading", "ragged"),
    Noticed("triton.io.store_row_numbers", "if program.sizes.T % rows else", "if False else", "ragged"),
    Noticed("triton.io._inside", "< piece.existing", "<= piece.existing", "odd heads"),
    # Scores, and what is differentiated.
    Noticed("triton.scores.scores", "raw + load_pairs", "raw - load_pairs", "bias"),
    Noticed("triton.scores.scores", "raw - slopes", "raw + slopes", "slopes"),
    Noticed("triton.scores.scores", "jnp.tanh(raw / ", "jnp.tanh(1 + raw / ", "soft cap"),
    Noticed("triton.scores.scores", "operands.key_scale is not None", "False", "step in 8 bits"),
    Noticed("triton.forward.attend", "operands.value_scale is not None", "False", "step in 8 bits"),
    Noticed("triton.scores.drop", "weights * spec.scale", "weights", "dropout"),
    Noticed("triton.backward.d_scores", " - rows.delta", "", "causal"),
    Noticed("triton.scores.times_slope", "(1 - steps.tanh", "(1 + steps.tanh", "soft cap"),
    Noticed("triton.backward.d_scores", "drop(program, d_weight, place)", "d_weight", "dropout"),
    Noticed("triton.backward._one_tile_of_d_query", "x * inputs.scale for", "x for", "causal"),
    Noticed("triton.backward._one_tile_of_d_key", "drop(one, weight, place)", "weight", "dropout"),
    Noticed("triton.score_gradient._one_tile", "d_score * distance(one, place)", "d_score", "slopes"),
    Noticed("triton.score_gradient._store", "(rows < size.T)[:", "(rows <= size.T)[:", "bias"),
    # Tangents.
    Noticed("triton.tangent._one_tile", "(d_query, key), (query, d_key)", "((d_query, key),)", "tangents"),
    Noticed("triton.tangent._one_tile", "(d_query, key), (query, d_key)", "((query, d_key),)", "tangents"),
    Noticed("triton.tangent._one_tile", "dropped * d_score", "weight * d_score", "tangents"),
    Noticed("triton.tangent._one_tile", "d_out, dropped, d_value", "d_out, weight, d_value", "tangents"),
    Noticed("triton.tangent._one_tile", "x - sums", "x + sums", "tangents"),
    Noticed("triton.tangent._d_score", "d_raw * (1 - tanh * tanh)", "d_raw", "tangents"),
    Noticed("triton.tangent._d_score", "-slope * ", "slope * ", "tangents"),
]
