"""Faults put into the decision which tiles are visited, and which of them go without a mask: one term at a time.

Each is a change of the text of one function under `mqa_jax.kernels`. `test_mutants` shows that the table of options
(or, where a fault costs time and changes no number, a test that counts tiles) notices every one of them.
"""

import contextlib
import importlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
      function: its module and name.
      old, new: text of its source, which must occur once, and what takes its place.
      way: in `ways.WAYS`; or the test that notices, as module.function.
      given: options of the rows of the way's table that notice; of these the ones with the fewest others are run.
    """

    function: str
    old: str
    new: str
    way: str
    given: tuple[str, ...] = ()


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The package with the fault in it, for whatever is traced meanwhile."""
    owner, name = _owner(mutant.function)
    found = inspect.getattr_static(owner, name)
    function = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", found))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) == 1, f"{mutant.function} has {mutant.old!r} {source.count(mutant.old)} times"
    module_code = compile(source.replace(mutant.old, mutant.new), f"<{mutant.function}>", "exec")
    (code,) = (x for x in module_code.co_consts if isinstance(x, types.CodeType) and x.co_name == name)
    right, function.__code__ = function.__code__, code  # for modules, too, that have imported the function by name
    try:
        yield
    finally:
        function.__code__ = right


def _owner(function: str) -> tuple[Any, str]:
    """The module or class that a function belongs to, and its name there."""
    *path, name = function.split(".")
    owner: Any = importlib.import_module("mqa_jax.kernels")
    for each in path:
        found = getattr(owner, each, None)
        owner = importlib.import_module(f"{owner.__name__}.{each}") if found is None else found
    return owner, name


_COUNTED = "test_visits.test_no_tile_is_visited_in_vain"
_FEW = "xla, few queries"

# -- ranges of positions, for both implementations --------------------------------------------------------------------

RANGES = [
    Mutant(
        "tiles.key_range",
        "minus(offset + row_start, left)",
        "minus(row_start, left)",
        "xla",
        ("window", "query_offset"),
    ),
    Mutant(
        "tiles.key_range",
        "minus(offset + row_start, left)",
        "minus(offset + row_start, left) + 1",
        "xla",
        ("window=past",),
    ),
    Mutant("tiles.key_range", "if left is not None", "if False", "xla", ("window",)),
    Mutant(
        "tiles.key_range",
        "plus(offset + (row_stop - 1), right)",
        "plus(row_stop - 1, right)",
        "xla",
        ("is_causal", "query_offset"),
    ),
    Mutant("tiles.key_range", "right)) + 1", "right))", "xla", ("is_causal", "query_offset=each row")),
    Mutant("tiles.key_range", "right)) + 1", "right)) + 2", "xla", ("is_causal", "query_offset=each row")),
    Mutant("tiles.key_range", "if right is not None", "if mask.is_causal", "xla", ("window",)),
    Mutant("tiles.key_range", "if right is not None", "if mask.window is not None", "xla", ("is_causal",)),
    Mutant("tiles.key_range", "if mask.key_lengths is not None", "if False", "xla", ("key_lengths",)),
    Mutant(
        "tiles.key_range",
        "jnp.minimum(stop, mask.key_lengths[0])",
        "jnp.minimum(stop, mask.key_lengths[0] - 1)",
        "xla",
        ("key_lengths",),
    ),
    Mutant(
        "tiles.key_range",
        "row_start < mask.query_lengths[0]",
        "row_start + 1 < mask.query_lengths[0]",
        "xla",
        ("query_lengths",),
    ),
    Mutant("tiles.key_range", "if mask.query_lengths is not None", "if False", _COUNTED),
    Mutant(
        "tiles.row_range", "first - jnp.clip(offset, ", "first - jnp.clip(0, ", "xla", ("is_causal", "query_offset")
    ),
    Mutant(
        "tiles.row_range",
        "minus(first, rows), first)",
        "minus(first, rows), first) + 1",
        "xla",
        ("is_causal", "query_offset=each row"),
    ),
    Mutant(
        "tiles.row_range",
        "minus(column_start, right)",
        "minus(column_start, right) + 1",
        "xla",
        ("is_causal", "query_offset=each row"),
    ),
    Mutant("tiles.row_range", "if right is not None", "if mask.is_causal", "xla", ("window",)),
    Mutant("tiles.row_range", "if right is not None", "if mask.window is not None", "xla", ("is_causal",)),
    Mutant("tiles.row_range", "jnp.maximum(offset, minus", "jnp.maximum(0, minus", "xla", ("window", "query_offset")),
    Mutant(
        "tiles.row_range", "plus(column_stop - 1, left)", "plus(column_stop - 1, left) - 1", "xla", ("window=past",)
    ),
    Mutant("tiles.row_range", "if left is not None", "if False", "xla", ("window",)),
    Mutant(
        "tiles.row_range",
        "jnp.minimum(stop, mask.query_lengths[0])",
        "jnp.minimum(stop, mask.query_lengths[0] - 1)",
        "xla",
        ("query_lengths",),
    ),
    Mutant(
        "tiles.row_range",
        "if mask.query_lengths is not None",
        "if False",
        "triton",
        ("query_lengths", "sizes=(96, 96)"),
    ),
    Mutant(
        "tiles.row_range",
        "column_start < mask.key_lengths[0]",
        "column_start + 1 < mask.key_lengths[0]",
        "xla",
        ("key_lengths",),
    ),
    Mutant("tiles.row_range", "if mask.key_lengths is not None", "if False", _COUNTED),
    Mutant("tiles.full_key_range", "row_stop - 1", "row_start", "xla", ("window",)),
    Mutant("tiles.full_key_range", "row_start + 1", "row_stop", "xla", ("is_causal",)),
    Mutant(
        "tiles.full_key_range",
        "replace(mask, query_lengths=None)",
        "replace(mask, key_lengths=None)",
        "xla",
        ("key_lengths",),
    ),
    Mutant("tiles.full_row_range", "column_stop - 1", "column_start", "xla", ("is_causal",)),
    Mutant("tiles.full_row_range", "column_start + 1", "column_stop", "xla", ("window",)),
    Mutant(
        "tiles.full_row_range",
        "replace(mask, key_lengths=None)",
        "mask",
        "test_visits.test_tiles_of_queries_without_mask_beside_padded_keys",
    ),
    Mutant(
        "tiles._by_index",
        "mask if mask.ring is None else replace(mask, is_causal=False, window=None)",
        "mask",
        "xla",
        ("ring", "is_causal"),
    ),
    Mutant("tiles.tile_range", "start // tile", "-(-start // tile)", "xla", ("window",)),
    Mutant("tiles.tile_range", "-(-stop // tile)", "stop // tile", "xla", ("is_causal",)),
    Mutant("tiles.tile_range", "-(-stop // tile)", "stop // tile + 1", _COUNTED),
]

# -- plain XLA --------------------------------------------------------------------------------------------------------

XLA = [
    # The fault that nobody saw: gradients of keys that are padding, in tiles that straddle the length.
    Mutant(
        "xla.tile.Tiling._owns_every_key",
        "owned if lengths is None else owned & (place.column + self.shape.columns <= lengths[place.batch])",
        "owned",
        "xla",
        ("key_lengths",),
    ),
    Mutant(
        "xla.tile.Tiling._owns_every_key",
        "owned & (place.column + self.shape.columns",
        "owned & (place.column",
        "xla",
        ("key_lengths",),
    ),
    Mutant("xla.tile.Tiling._owns_every_key", "owned if lengths is None", "owned | True if lengths is None", "xla"),
    Mutant("xla.tile.Tiling._owns_every_key", "else owned & (", "else (", "xla", ("key_lengths",)),
    Mutant(
        "xla.tile.Tiling.over_row_tiles",
        "jnp.where(self._owns_every_key(place), stop, 0)",
        "stop",
        "xla",
        ("key_lengths",),
    ),
    Mutant("xla.tile.Tiling.over_column_tiles", "tiles.full_key_range)", "tiles.key_range)", "xla", ("is_causal",)),
    Mutant("xla.tile.Tiling.over_row_tiles", "tiles.full_row_range)", "tiles.row_range)", "xla", ("is_causal",)),
    Mutant("xla.tile.Tiling._ranges", "-(-every[0] // tile)", "every[0] // tile", "xla", ("window",)),
    Mutant("xla.tile.Tiling._ranges", "every[1] // tile", "-(-every[1] // tile)", "xla", ("is_causal",)),
    Mutant(
        "xla.tile.Tiling._ranges",
        "jnp.clip(-(-every[0] // tile), start, stop)",
        "-(-every[0] // tile)",
        "test_visits.test_ranges_of_tiles_are_in_order",
    ),
    Mutant("xla.tile.Tiling._ranges", "tile, full_start, stop)", "tile, start, stop)", "xla", ("window",)),
    Mutant("xla.tile.Tiling._over", "tile < full_start", "tile <= full_start", "xla", ("window",)),
    Mutant("xla.tile.Tiling._over", "tile + skipped)", "tile)", "xla", ("is_causal",)),
    Mutant("xla.tile.Tiling._over", "stop - skipped", "stop - skipped - 1", "xla", ("is_causal",)),
    Mutant("xla.tile.Tiling._is_uniform", "mask.allowed, ", "", "xla", ("mask",)),
    Mutant("xla.tile.Tiling._is_uniform", "mask.query_segments, ", "", "xla", ("segments",)),
    Mutant("xla.tile.Tiling._is_uniform", "mask.query_lengths, ", "", "xla", ("query_lengths",)),
    Mutant("xla.tile.Tiling._is_uniform", ", mask.ring", "", "xla", ("ring", "is_causal")),
    Mutant(
        "xla.tile.Tiling._is_uniform",
        "one or self._hides_nothing or ",
        "one or ",
        "test_visits.test_one_loop_where_nothing_is_hidden",
    ),
    Mutant(
        "xla.tile.Tiling._is_uniform",
        "one or self._hides_nothing",
        "self._hides_nothing",
        "test_visits.test_one_loop_where_nothing_is_hidden",
    ),
    Mutant(
        "xla.tile.Tiling._hides_nothing", "whole and not", "not", "test_visits.test_two_loops_where_something_is_hidden"
    ),
    Mutant(
        "xla.tile.Tiling._hides_nothing",
        "not mask.hides_pairs and ",
        "",
        "test_visits.test_two_loops_where_something_is_hidden",
    ),
    Mutant(
        "xla.tile.Tiling._hides_nothing",
        " and mask.key_lengths is None",
        "",
        "test_visits.test_two_loops_where_something_is_hidden",
    ),
    Mutant("xla.tile.Tiling.visible", "if self.sizes.T % self.shape.rows != 0", "if False", "xla", ("is_causal",)),
    Mutant("xla.tile.Tiling.visible", "if self.sizes.S % self.shape.columns != 0", "if False", "xla"),
    Mutant("xla.tile.Tiling.visible", "rows >= place.owned_row", "rows > place.owned_row", "xla"),
    Mutant("xla.tile.Tiling.visible", "columns >= place.owned_column", "columns > place.owned_column", "xla"),
    Mutant("xla.tile.Tiling.at_row_tile", "owned_row=owned", "owned_row=owned * 0", "xla"),
    Mutant("xla.tile.Tiling.at_column_tile", "owned_column=owned", "owned_column=owned * 0", "xla"),
    Mutant(
        "xla.tile.Tiling.at_row_tile",
        "jnp.minimum(owned, self.sizes.T - self.shape.rows)",
        "owned",
        "xla",
        ("is_causal",),
    ),
    Mutant("xla.tile.Tiling.at_column_tile", "jnp.minimum(owned, self.sizes.S - self.shape.columns)", "owned", "xla"),
    Mutant("xla.tile.Tiling._masked_step", "jnp.any(may_attend)", "jnp.all(may_attend)", "xla", ("mask",)),
]

# -- plain XLA, few queries -------------------------------------------------------------------------------------------

FEW_QUERIES = [
    Mutant(
        "xla.decode._BlockRange.seen",
        "jnp.min(jnp.where(start < stop, start, stop.max()))",
        "jnp.max(start)",
        _FEW,
        ("window", "query_offset"),
    ),
    Mutant(
        "xla.decode._BlockRange.seen",
        "jnp.where(start < stop, start, stop.max())",
        "start",
        "test_visits.test_blocks_that_only_an_empty_row_would_see",
    ),
    Mutant(
        "xla.decode._BlockRange.seen", "jnp.max(full_start)", "jnp.min(full_start)", _FEW, ("window", "query_offset")
    ),
    Mutant("xla.decode._BlockRange.seen", "jnp.min(full_stop)", "jnp.max(full_stop)", _FEW, ("key_lengths",)),
    Mutant("xla.decode._BlockRange.seen", "jnp.max(stop)", "jnp.min(stop)", _FEW, ("key_lengths",)),
    Mutant(
        "xla.decode._BlockRange.is_full", "index < self.full_stop", "index <= self.full_stop", _FEW, ("key_lengths",)
    ),
    Mutant(
        "xla.decode._BlockRange.is_full",
        "self.full_start <= index",
        "self.full_start - 1 <= index",
        _FEW,
        ("window", "query_offset"),
    ),
    Mutant(
        "xla.decode._full",
        "query_offset=mask.query_offset, ",
        "",
        _FEW,
        ("alibi_slopes", "query_offset", "key_lengths"),
    ),
    Mutant("xla.decode._full", "query_lengths=mask.query_lengths, ", "", _FEW, ("query_lengths",)),
    Mutant(
        "xla.decode.forward_few_queries",
        "inputs.mask.hides_pairs or ",
        "",
        _FEW,
        ("window", "sizes=(4, 64)", "tiles=(8, False)"),
    ),
    Mutant(
        "xla.decode.forward_few_queries",
        "inputs.mask.key_lengths is not None or ",
        "",
        _FEW,
        ("key_lengths", "sizes=(4, 64)", "tiles=(8, False)"),
    ),
    Mutant("xla.decode._visible", "block.columns >= block.owned", "block.columns >= 0", _FEW),
    Mutant("xla.decode.Block.number", "jnp.minimum(owned, sizes.S - length)", "owned", _FEW),
]

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

# -- functions of scores and masks ------------------------------------------------------------------------------------

_FEW_OF_TRITON = "triton, few queries"

FUNCTIONS = [
    Mutant("tile_bounds._of_function", "jnp.any(visible", "jnp.all(visible", "triton", ("mask_fn",)),
    Mutant("tile_bounds._of_function", "jnp.all(visible", "jnp.any(visible", "triton", ("mask_fn",)),
    Mutant("tile_bounds._of_function", "stop - 1)", "stop - 2)", _FEW_OF_TRITON, ("mask_fn",)),
    Mutant("xla.tile.Tiling._is_uniform", "mask.function, ", "", "xla", ("mask_fn",)),
    Mutant("xla.tile.Tiling.mask_of_row", "cut(function.batch)", "function.batch[:1]", "xla", ("mask_fn",)),
    Mutant("xla.tile.Tiling.query_heads", "place.head * self.sizes.G + ", "", "xla", ("score_fn",)),
    Mutant("xla.scores.score_function", "batch[place.batch]", "batch[0]", "xla", ("score_fn",)),
    Mutant("xla.scores.slope", "steps.capped is None", "True", "xla", ("score_fn",)),
    Mutant("xla.scores.slope", "of_function * factor", "of_function", "xla", ("score_fn", "soft_cap")),
    Mutant(
        "xla.backward.add_to_score_terms",
        "jax.tree.map(jnp.add, sums.score_arrays, added)",
        "added",
        "xla",
        ("score_fn",),
    ),
    Mutant("xla.decode._of_function", "score_fn.batch[:,", "score_fn.batch[:1,", _FEW, ("score_fn",)),
    Mutant("xla.decode._unless_hidden", "jnp.any(visible)", "jnp.all(visible)", _FEW, ("mask_fn",)),
    Mutant(
        "xla.backward.score_arrays_in_tiles",
        "map(jnp.add, sums, ",
        "map(lambda a, b: b, sums, ",
        "triton",
        ("score_fn",),
    ),
    Mutant("triton.scores.times_slope", "steps.score_fn is not None", "False", "triton", ("score_fn",)),
    Mutant("triton.functions._pairs", "head * program.group", "head", _FEW_OF_TRITON, ("score_fn",)),
    Mutant("triton.tables._inside", "jnp.where(index < 0, index + length, index)", "index", "triton", ("score_fn",)),
]

MUTANTS = [*RANGES, *XLA, *FEW_QUERIES, *BOUNDS, *TRITON, *FUNCTIONS]

# Terms whose loss changes neither a number nor how many tiles are visited.
WITHOUT_EFFECT = {
    "xla.decode._full: ring=mask.ring": "no block is full where there is a ring (`tile_bounds.key_tiles`)",
    "xla.decode.forward_few_queries: or size.S % steps.columns": "`_visible` masks the block that is moved back anyway",
    "tile_bounds._extremes: mode='edge'": "what is padded lies beyond the array; any id there only widens a range",
    "triton.grid.Visits._existing": "keeps an address inside the array; what is read there is multiplied by 0",
    "triton.positions.query_positions: inside": "what a function returns for pairs outside the array is not used",
    "triton.grid.Visits.last": "`previous` of one step more",
}
