"""Functions of the caller in a kernel."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from mqa_jax.kernels.triton.call import divided, load
from mqa_jax.kernels.triton.positions import key_positions, query_positions
from mqa_jax.kernels.triton.program import Place, Program
from mqa_jax.kernels.triton.tables import once_and_again
from mqa_jax.pair_function import PairFunction

OfScores = Callable[[Array], Array]


def allowed(program: Program, place: Place, function: PairFunction) -> Array:
    """The bools of `mask_fn` for a tile."""
    once, _ = once_and_again(function.function, function.arrays, load)
    return jnp.broadcast_to(once(*_pairs(program, place, function)), _shape(program))


def of_scores(program: Program, place: Place) -> tuple[OfScores, OfScores]:
    """`score_fn` in a tile, and the same for its derivative, which reads no memory."""
    score_fn = program.inputs.score_fn
    assert score_fn is not None
    score_fn = score_fn.joined(program.inputs.operands.score_arrays)
    once, again = once_and_again(score_fn.function, score_fn.arrays, load)
    pairs = _pairs(program, place, score_fn)
    return lambda score: once(score, *pairs), lambda score: again(score, *pairs)


def _pairs(program: Program, place: Place, function: PairFunction) -> tuple[Array, ...]:
    """Batch row, head and positions. Pairs outside the arrays have the positions of some inside."""
    head = program.head
    if program.group > 1:
        head = head * program.group + divided(program.rows(place), program.group)[1]
    query, key = (positions(program, place, inside=True) for positions in (query_positions, key_positions))
    return load(function.batch, program.batch), head, query, key


def _shape(program: Program) -> tuple[int, int]:
    rows, columns = program.config.rows, program.config.columns
    return (columns, rows) if program.transposed else (rows, columns)
