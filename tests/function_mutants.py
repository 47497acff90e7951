"""Mutants of functions of scores and masks."""

from mutant import Mutant

_FEW_OF_XLA = "xla, few queries"
_FEW_OF_TRITON = "triton, few queries"

FUNCTIONS = [
    Mutant("tile_bounds._of_function", "jnp.any(visible", "jnp.all(visible", "triton", ("mask_fn",)),
    Mutant("tile_bounds._of_function", "jnp.all(visible", "jnp.any(visible", "triton", ("mask_fn",)),
    Mutant(
        "tile_bounds._of_function",
        "stop - 1)",
        "stop - 2)",
        "test_tiles_of_a_mask_fn.test_what_the_last_query_alone_sees",
    ),
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
    Mutant("xla.decode._of_function", "score_fn.batch[:,", "score_fn.batch[:1,", _FEW_OF_XLA, ("score_fn",)),
    Mutant("xla.decode._unless_hidden", "jnp.any(visible)", "jnp.all(visible)", _FEW_OF_XLA, ("mask_fn",)),
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
