"""Faults put into the kernels' source, each of which a call on an emulated GPU notices: `--kinds mutants`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import mutants
from emulated_cases import OPTIONS, Case, Options, everything, sizes
from mutants import Mutant

step: Options = lambda rng: dict(
    key_value_seq_lengths=jnp.array([700, 3], jnp.int32),
    query_offset=jnp.array([699, 2], jnp.int32),
    is_causal=True,
    sinks=jnp.asarray([0.5, 1, 2, 3, 0, -1], jnp.float32),
)
_WHOLE: dict[str, Any] = sizes(97, 131, 6, 2, 64, batch=2)
CALLS = {
    "causal": Case("causal", "bfloat16", sizes(150, 203, 2, 1, 64), OPTIONS["causal"]),
    "ragged": Case("ragged", "bfloat16", sizes(37, 67, 2, 1, 80)),
    "large heads": Case("large heads", "bfloat16", sizes(113, 203, 2, 1, 256)),
    "step": Case("step", "bfloat16", sizes(1, 1003, 6, 2, 64, batch=2), step, gradients=False),
    "step in 8 bits": Case("step", "bfloat16", sizes(1, 1003, 6, 2, 64), gradients=False, bits="int8"),
    "everything": Case("everything", "bfloat16", _WHOLE, everything(97, 131)),
    **{
        name: Case(name, "bfloat16", _WHOLE, OPTIONS[name])
        for name in ("rows that see nothing", "segments", "mask", "bias", "slopes", "soft cap", "sinks", "dropout")
    },
}


class Noticed(NamedTuple):
    function: str
    old: str
    new: str
    call: str

    def __str__(self) -> str:
        return f"{self.function}: {self.old} -> {self.new or 'nothing'}"

    def judge(self) -> None:
        """Raises where the fault stays unnoticed."""
        with mutants.applied(Mutant(self.function, self.old, self.new, "")):
            try:
                CALLS[self.call].judge("triton")
            except Exception:  # the oracle's, or the emulator's
                return
        raise AssertionError(f"nobody notices, in {CALLS[self.call]}")


MUTANTS = [
    # The running softmax.
    Noticed("triton_forward.attend", "state.total * rescale", "state.total", "ragged"),
    Noticed("triton_forward.attend", "x * rescale[:, None] for x", "x for x", "causal"),
    Noticed("triton_forward.attend", "x * rescale[:, None] + program", "x + program", "large heads"),
    Noticed("triton_forward.attend", "jnp.sum(weight, axis=1)", "jnp.sum(dropped, axis=1)", "dropout"),
    Noticed("triton_forward.finish", "highest > -jnp.inf", "highest == highest", "rows that see nothing"),
    Noticed("triton_forward.finish", "part == 0", "part >= 0", "step"),
    Noticed("triton_forward.finish", "x * factor", "x", "ragged"),
    Noticed("triton_merge.merge", " + log_totals", "", "step"),
    Noticed("triton_merge.merge", "weights[:, None] * found", "found", "step"),
    # Which tiles, and in which order.
    Noticed("triton_forward.attend", "key_tiles.previous(number, masked)", "key_tiles.number(number, masked)", "causal"),
    Noticed("triton_grid.over_query_tiles", "tiles - 1 - program_id(1)", "tiles - program_id(1)", "ragged"),
    Noticed("triton_grid.KeyTiles.number", "self.full_start + step", "self.start", "large heads"),
    Noticed("triton_grid.KeyTiles.masked", "self.left + ", "", "segments"),
    Noticed("triton_grid.Share.range", "part(self.number + 1)", "part(self.number + 1) - 1", "causal"),
    Noticed("triton_backward._one_tile_of_d_key", "program.head + head", "program.head", "causal"),
    Noticed("triton_backward._one_tile_of_d_key", "tiles * size.G", "tiles", "causal"),
    # Terms of the mask.
    Noticed("triton_tile.Program.visible", "mask.is_causal or mask.window is not None", "False", "causal"),
    Noticed("triton_tile.Program.visible", "self._row_ids(place) == self", "self._row_ids(place) <= self", "segments"),
    Noticed("triton_tile.Program.visible", "mask.allowed is not None", "False", "mask"),
    Noticed("triton_tile.Program.visible", "self.ragged_columns()", "False", "ragged"),
    Noticed("triton_tile.Program.query_positions", " + self.query_offset()", "", "rows that see nothing"),
    # Guards of loads and stores.
    Noticed("triton_tile.Program._read", "tile, limit, piece", "tile, None, piece", "ragged"),
    Noticed("triton_tile.Program.store_rows", "self.config.rows, limit, piece", "self.config.rows, None, piece", "ragged"),
    Noticed("triton_tile.Program.store_columns", "columns, limit, piece", "columns, None, piece", "ragged"),
    Noticed("triton_tile.Program.store_row_numbers", "if self.sizes.T % tile else None", "if False else None", "ragged"),
    Noticed("triton_tile._inside", "< piece.existing", "<= piece.existing", "ragged"),
    # Scores, and what is differentiated.
    Noticed("triton_tile.Program.scores", "raw + self.pairs", "raw - self.pairs", "bias"),
    Noticed("triton_tile.Program.scores", "raw - self.of_heads", "raw + self.of_heads", "slopes"),
    Noticed("triton_tile.Program.scores", "jnp.tanh(raw / ", "jnp.tanh(1 + raw / ", "soft cap"),
    Noticed("triton_tile.Program.scores", "operands.key_scale is not None", "False", "step in 8 bits"),
    Noticed("triton_forward.attend", "operands.value_scale is not None", "False", "step in 8 bits"),
    Noticed("triton_tile.Program.drop", "weights * spec.scale", "weights", "dropout"),
    Noticed("triton_backward.d_scores", " - rows.delta", "", "causal"),
    Noticed("triton_backward.d_scores", "(1 - tanh * tanh)", "(1 + tanh * tanh)", "soft cap"),
    Noticed("triton_backward.d_scores", "program.drop(d_weight, place)", "d_weight", "dropout"),
    Noticed("triton_backward._one_tile_of_d_query", "x * program.inputs.scale for", "x for", "causal"),
    Noticed("triton_backward._one_tile_of_d_key", "one.drop(weight, place)", "weight", "dropout"),
    Noticed("triton_score_gradient._one_tile", "d_score * one.distance(place)", "d_score", "slopes"),
    Noticed("triton_score_gradient._store", "(rows < size.T)[:", "(rows <= size.T)[:", "bias"),
]  # fmt: skip
