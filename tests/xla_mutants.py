"""Faults put into ranges of positions, and into the visits of tiles in plain XLA."""

from mutant import Mutant

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
        ("window", "sizes=(4, 72)"),
    ),
    Mutant(
        "xla.decode.forward_few_queries",
        "inputs.mask.key_lengths is not None or ",
        "",
        _FEW,
        ("key_lengths", "sizes=(4, 72)"),
    ),
    Mutant("xla.decode._visible", "block.columns >= block.owned", "block.columns >= 0", _FEW),
    Mutant("xla.decode.Block.number", "jnp.minimum(owned, sizes.S - length)", "owned", _FEW),
]
