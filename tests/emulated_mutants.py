"""Faults put into the kernels' source, each of which a call on an emulated GPU notices: `--kinds mutants`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mutants
from emulated_cases import OPTIONS, Case, Options, everything, sizes
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

# Left out: `highest > -inf` in triton_forward.finish, which matters only where hidden values are not finite.
MUTANTS = [
    # The running softmax.
    Noticed("triton_forward.attend", "state.total * rescale", "state.total", "causal"),
    Noticed("triton_forward.attend", "x * rescale[:, None] for x", "x for x", "causal", DEFERS),
    Noticed("triton_forward.attend", "x * rescale[:, None] + program", "x + program", "causal", ("a100", "l40s")),
    Noticed("triton_forward.attend", "jnp.sum(weight, ", "jnp.sum(program.drop(weight, place), ", "dropout"),
    Noticed("triton_forward.finish", "part == 0", "part >= 0", "step"),
    Noticed("triton_forward.finish", "x * factor", "x", "ragged"),
    Noticed("triton_merge.merge", " + log_totals", "", "step"),
    Noticed("triton_merge.merge", "weights[:, None] * found", "found", "step"),
    # Which tiles, and in which order.
    Noticed("triton_forward.attend", "key_tiles.previous(", "key_tiles.number(", "causal", DEFERS),
    Noticed("triton_grid.over_query_tiles", "tiles - 1 - program_id(1)", "tiles - program_id(1)", "causal"),
    Noticed("triton_grid.over_query_tiles", "tiles - 1 - program_id(1)", "jnp.int32(0)", "causal"),
    Noticed("triton_grid.KeyTiles.number", "self.full_start + step", "self.start", "large heads"),
    Noticed("triton_grid.KeyTiles.number", "self.full_stop + step - ", "self.full_start + step - ", "causal"),
    Noticed("triton_grid.KeyTiles.masked", "self.left + ", "", "windows"),
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
    Noticed("triton_tile.Program.store_rows", "limit, piece)", "None, piece)", "ragged"),
    Noticed("triton_tile.Program.store_columns", "limit, piece)", "None, piece)", "ragged"),
    Noticed("triton_tile.Program.store_row_numbers", "if self.sizes.T % tile else", "if False else", "ragged"),
    Noticed("triton_tile._inside", "< piece.existing", "<= piece.existing", "odd heads"),
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
]
