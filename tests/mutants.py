"""Faults put into the choice of tiles, of those that go without a mask, and into tangents: one term at a time.

Each is a change of the text of one function under `mqa_jax.kernels`. `test_mutants` shows that the table of options
(or, where a fault costs time and changes no number, a test that counts tiles) notices every one of them.
"""

from function_mutants import FUNCTIONS
from mutant import Mutant
from mutant import applied as applied
from tangent_mutants import TRITON_TANGENT, XLA_TANGENT
from xla_mutants import FEW_QUERIES, RANGES, XLA

_COUNTED = "test_visits.test_no_tile_is_visited_in_vain"
_FEW = "xla, few queries"

# -- tables of tiles, and the Triton kernels --------------------------------------------------------------------------

_NEEDS = "mask.allowed is not None or mask.ring is not None"

BOUNDS = [
    Mutant("tile_bounds.key_tiles", _NEEDS, "mask.ring is not None", "triton", ("mask",)),
    Mutant("tile_bounds.key_tiles", _NEEDS, "mask.allowed is not None", "triton", ("ring", "is_causal")),
    Mutant("tile_bounds.row_tiles", _NEEDS, "mask.ring is not None", "triton", ("mask",)),
    Mutant("tile_bounds.row_tiles", _NEEDS, "mask.allowed is not None", "triton", ("ring", "is_causal")),
    Mutant(
        "tile_bounds.key_tiles",
        "start, stop = tile * rows // group",
        "start, stop = -(-tile * rows // group)",
        "test_visits.test_tiles_of_several_heads_of_a_query",
    ),
    Mutant(
        "tile_bounds.key_tiles",
        "jnp.minimum(-(-(tile + 1) * rows // group), sizes.T)",
        "jnp.minimum((tile + 1) * rows // group, sizes.T)",
        "test_visits.test_tiles_of_several_heads_of_a_query",
    ),
    Mutant(
        "tile_bounds.key_tiles",
        "jnp.minimum(-(-(tile + 1) * rows // group), sizes.T)",
        "-(-(tile + 1) * rows // group)",
        _COUNTED,
    ),
    Mutant("tile_bounds.row_tiles", "jnp.minimum((tile + 1) * columns, sizes.S)", "(tile + 1) * columns", _COUNTED),
    Mutant("tile_bounds.key_tiles", "tiles.full_key_range(", "tiles.key_range(", "triton", ("is_causal",)),
    Mutant("tile_bounds.row_tiles", "tiles.full_row_range(", "tiles.row_range(", "triton", ("is_causal",)),
    Mutant("tile_bounds._bounds", "-(-full_start // tile)", "full_start // tile", "triton", ("window",)),
    Mutant("tile_bounds._bounds", ", full_stop // tile", ", -(-full_stop // tile)", "triton", ("is_causal",)),
    Mutant(
        "tile_bounds._bounds", "jnp.maximum(start, some[0])", "jnp.maximum(start, some[0] + 1)", "triton", ("segments",)
    ),
    Mutant(
        "tile_bounds._bounds", "jnp.minimum(stop, some[1])", "jnp.minimum(stop, some[1] - 1)", "triton", ("segments",)
    ),
    Mutant(
        "tile_bounds._bounds",
        "jnp.maximum(start, some[0]), jnp.minimum(stop, some[1])",
        "start, stop",
        "test_tile_bounds.test_packed_documents_visit_their_own_tiles",
    ),
    Mutant("tile_bounds._bounds", "jnp.maximum(full_start, every[0])", "full_start", "triton", ("segments",)),
    Mutant("tile_bounds._bounds", "jnp.minimum(full_stop, every[1])", "full_stop", "triton", ("segments",)),
    Mutant(
        "tile_bounds._bounds",
        "    full_start = jnp.clip(full_start, start, stop)\n",
        "",
        "test_visits.test_tables_of_tiles_are_in_order",
    ),
    Mutant(
        "tile_bounds._bounds", "jnp.clip(full_stop, full_start, stop)", "full_stop", "triton", ("key_lengths", "window")
    ),
    Mutant("tile_bounds._bounds", "jnp.maximum(start, stop)", "stop", "test_visits.test_tables_of_tiles_are_in_order"),
    Mutant("tile_bounds._related", "own_low <= other_high", "own_low < other_high", "triton", ("segments",)),
    Mutant("tile_bounds._related", "other_low <= own_high", "other_low < own_high", "triton", ("segments",)),
    Mutant("tile_bounds._related", "(own_low == own_high) & ", "", "triton", ("segments",)),
    Mutant("tile_bounds._related", "(other_low == other_high) & ", "", "triton", ("segments",)),
    Mutant("tile_bounds._related", " & (own_low == other_low)", "", "triton", ("segments",)),
    Mutant("tile_bounds._extremes", "jnp.min(", "jnp.max(", "triton", ("segments",)),
    Mutant("tile_bounds._hull", "count - _first(", "count - 1 - _first(", "triton", ("segments",)),
    Mutant("tile_bounds._first_run", ">= start[..., None]", ">= start[..., None] + 99", "triton", ("segments",)),
]

TRITON = [
    Mutant(
        "triton.mask.visible",
        "if mask.is_causal or mask.window is not None",
        "if mask.is_causal",
        "triton",
        ("window",),
    ),
    Mutant(
        "triton.mask.visible",
        "if mask.is_causal or mask.window is not None",
        "if mask.window is not None",
        "triton",
        ("is_causal",),
    ),
    Mutant("triton.mask.visible", "if program.ragged_columns()", "if False", "triton", ("key_lengths",)),
    Mutant(
        "triton.mask.visible",
        "program.columns(place) < program.column_limit()",
        "program.columns(place) <= program.column_limit()",
        "triton",
        ("key_lengths",),
    ),
    Mutant("triton.mask.visible", "if mask.query_segments is not None", "if False", "triton", ("segments",)),
    Mutant("triton.mask.visible", "if mask.allowed is not None", "if False", "triton", ("mask",)),
    Mutant("triton.mask.query_positions", " + _query_offset(program)", "", "triton", ("is_causal", "query_offset")),
    Mutant(
        "triton.mask.key_positions",
        "columns if ring is None",
        "columns if True",
        "triton",
        ("ring", "is_causal"),
    ),
    Mutant(
        "triton.program.Program.row_limit",
        "self.sizes.T if lengths is None",
        "self.sizes.T if True",
        "triton",
        ("query_lengths",),
    ),
    Mutant(
        "triton.program.Program.column_limit",
        "self.sizes.S if lengths is None",
        "self.sizes.S if True",
        "triton",
        ("key_lengths",),
    ),
    Mutant(
        "triton.program.Program.ragged_rows",
        " or self.inputs.mask.query_lengths is not None",
        "",
        "triton",
        ("query_lengths", "sizes=(96, 96)"),
    ),
    Mutant(
        "triton.program.Program.ragged_columns",
        " or self.inputs.mask.key_lengths is not None",
        "",
        "triton",
        ("key_lengths", "sizes=(96, 96)"),
    ),
    Mutant("triton.program.Program.ragged_rows", "self.sizes.T % self.config.rows != 0 or", "", "triton"),
    Mutant("triton.program.Program.ragged_columns", "self.sizes.S % self.config.columns != 0 or", "", "triton"),
    Mutant(
        "triton.mask.may_mask",
        "program.inputs.mask.hides_pairs or ",
        "",
        "triton",
        ("is_causal", "sizes=(96, 96)"),
    ),
    Mutant(
        "triton.mask.may_mask",
        "program.inputs.mask.hides_pairs or ragged",
        "program.inputs.mask.hides_pairs",
        "triton",
    ),
    Mutant(
        "triton.mask.may_mask", "program.ragged_rows() if program.transposed else ", "", "triton", ("sizes=(83, 64)",)
    ),
    Mutant("triton.grid.Visits.tile", "self.full_start + step", "self.start + step", "triton", ("window",)),
    Mutant("triton.grid.Visits.tile", "step < self.left", "step <= self.left", "triton", ("window",)),
    Mutant(
        "triton.grid.Visits.tile",
        "self.full_stop + step - self.left",
        "self.full_stop + step",
        "triton",
        ("window",),
    ),
    Mutant(
        "triton.grid.Visits.masked",
        "self.left + self.stop - self.full_stop",
        "self.stop - self.full_stop",
        "triton",
        ("window",),
    ),
    Mutant(
        "triton.grid.Visits.full",
        "self.full_stop - self.full_start",
        "self.stop - self.full_start",
        "triton",
        ("is_causal",),
    ),
    Mutant("triton.grid.Visits.left", "self.full_start - self.start", "self.start * 0", "triton", ("window",)),
    Mutant("triton.grid.Visits.previous", "self.full_stop - 1", "self.start", "triton", ("is_causal",)),
    Mutant(
        "triton.grid.Visits.previous",
        "self.tile(step - 1, masked)",
        "self.tile(step, masked)",
        "triton",
        ("is_causal",),
    ),
    Mutant(
        "triton.grid.Visits.load",
        "program.batch if bounds.shape[0] > 1 else 0",
        "0",
        "triton",
        ("key_lengths",),
    ),
    Mutant(
        "triton.score_gradient._hull",
        "jnp.min(bounds[..., 0], axis=0)",
        "jnp.max(bounds[..., 0], axis=0)",
        "triton",
        ("alibi_slopes", "window", "query_offset=each row"),
    ),
    Mutant(
        "triton.score_gradient._hull",
        "jnp.max(bounds[..., 3], axis=0)",
        "jnp.min(bounds[..., 3], axis=0)",
        "triton",
        ("alibi_slopes", "key_lengths"),
    ),
    Mutant(
        "triton.score_gradient._one_tile",
        "(start <= column_tile) & (column_tile < stop)",
        "(start < column_tile) & (column_tile < stop)",
        "triton",
        ("bias=ZNTS",),
    ),
    Mutant(
        "triton.score_gradient._one_tile",
        "(start <= column_tile) & (column_tile < stop)",
        "(start <= column_tile) & (column_tile + 1 < stop)",
        "triton",
        ("bias=ZNTS",),
    ),
    Mutant(
        "triton.backward._one_tile_of_d_key",
        "if inputs.mask.key_lengths is not None",
        "if False",
        "triton",
        ("key_lengths",),
    ),
]

MUTANTS = [*RANGES, *XLA, *FEW_QUERIES, *BOUNDS, *TRITON, *XLA_TANGENT, *TRITON_TANGENT, *FUNCTIONS]

# Terms whose loss changes neither a number nor how many tiles are visited.
WITHOUT_EFFECT = {
    "xla.decode._full: ring=mask.ring": "no block is full where there is a ring (`tile_bounds.key_tiles`)",
    "xla.decode.forward_few_queries: or size.S % steps.columns": "`_visible` masks the block that is moved back anyway",
    "tile_bounds._extremes: mode='edge'": "what is padded lies beyond the array; any id there only widens a range",
    "triton.grid.Visits._existing": "keeps an address inside the array; what is read there is multiplied by 0",
    "triton.positions.query_positions: inside": "what a function returns for pairs outside the array is not used",
    "triton.grid.Visits.last": "`previous` of one step more",
}
