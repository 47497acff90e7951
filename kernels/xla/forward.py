"""The forward pass in plain XLA: FlashAttention-2 (arXiv 2307.08691), algorithm 1, with memory linear in T and S."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs
from mqa_jax.kernels import online_softmax
from mqa_jax.kernels.online_softmax import Normalizer
from mqa_jax.kernels.xla.scores import drop, product, scores
from mqa_jax.kernels.xla.tile import Place, TileShape, Tiling
from mqa_jax.shapes import Output


def forward_in_tiles(inputs: Inputs, shape: TileShape) -> tuple[Output, Normalizer]:
    """For each tile of queries, a running softmax over the tiles of keys that its mask does not hide entirely."""
    tiling, size = Tiling(inputs, shape), inputs.sizes

    def query_tile(index: Array, results: tuple[Array, Normalizer]) -> tuple[Array, Normalizer]:
        place = tiling.place(index // tiling.row_tiles)
        place = tiling.at_row_tile(place, index % tiling.row_tiles)
        place = place._replace(owned_row=place.row)  # rows covered twice are computed twice, with equal results
        query = tiling.queries(inputs.operands.query, place)
        state = online_softmax.State.empty(shape.heads, shape.rows * size.G, features=size.V, dtype=inputs.score_dtype)
        state = tiling.over_column_tiles(place, functools.partial(attend, tiling, query), state)
        found = online_softmax.finish(state, sinks_of_rows(tiling, place))
        return jax.tree.map(lambda into, x: tiling.store_queries(into, x, place), results, found)

    heads = size.B, size.T, size.K, size.G
    number = jnp.zeros((*heads, 1), inputs.score_dtype)
    results = jnp.zeros((*heads, size.V), inputs.out_dtype), Normalizer(number, number)
    out, normalizer = lax.fori_loop(0, tiling.head_blocks * tiling.row_tiles, query_tile, results)
    of_rows = lambda x: x.reshape(size.B, size.T, size.N)
    return out.reshape(size.B, size.T, size.N, size.V), jax.tree.map(of_rows, normalizer)


def attend(
    tiling: Tiling,
    query: Float[Array, "P R H"],
    place: Place,
    may_attend: Array | None,
    state: online_softmax.State,
) -> online_softmax.State:
    """Adds one tile of keys to the running softmax."""
    operands = tiling.inputs.operands
    key, value = tiling.keys(operands.key, place), tiling.keys(operands.value, place)
    score, _ = scores(tiling, query, key, may_attend, place)
    score = tiling.as_matrix(score)
    highest = jnp.maximum(state.highest, jnp.max(score, axis=-1, keepdims=True))
    shift = online_softmax.finite(highest)
    weight, rescale = jnp.exp(score - shift), jnp.exp(state.highest - shift)
    total = state.total * rescale + jnp.sum(weight, axis=-1, keepdims=True)
    weight = drop(tiling, weight, place)
    if operands.value_scale is not None:
        weight = weight * tiling.scales(operands.value_scale, place)[:, 0]
    weighted = product(tiling, "prk,pkv->prv", weight, value, tiling.inputs.weight_dtype)
    return online_softmax.State(highest, total, state.weighted * rescale + weighted)


def sinks_of_rows(tiling: Tiling, place: Place) -> Float[Array, "P R 1"] | None:
    """The sink of each row; -inf, which means no sink, in queries that are padding."""
    sinks, lengths = tiling.inputs.operands.sinks, tiling.inputs.mask.query_lengths
    if sinks is None:
        return None
    sinks = tiling.heads(sinks, place)
    if lengths is not None:
        sinks = jnp.where((tiling.rows(place) < lengths[place.batch])[:, None, None], sinks, -jnp.inf)
    shape = tiling.shape.heads, tiling.shape.rows, tiling.sizes.G, 1
    return jnp.broadcast_to(sinks, shape).reshape(tiling.shape.heads, -1, 1)
