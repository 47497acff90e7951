"""Packs the query heads of a key/value head into neighbouring rows, so that one tile reads its keys for all of them."""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float

from mqa_jax.inputs import Inputs, Sizes


def pack(inputs: Inputs) -> Inputs:
    """The inputs with `[B, T * G, K, H]` queries, the heads of a group side by side, and with all row arrays to match.

    Bias and mask, which may be as long as the cache, stay `[#B, #N, #T, #S]`; `load_pairs` maps rows to their entries.
    """
    operands, mask, size = inputs.operands, inputs.mask, inputs.sizes
    query = operands.query.reshape(size.B, size.T, size.K, size.G, size.H).swapaxes(2, 3)
    return replace(
        inputs,
        operands=replace(
            operands,
            query=query.reshape(size.B, size.T * size.G, size.K, size.H),
            alibi_slopes=_pack_heads(operands.alibi_slopes, size),
            sinks=_pack_heads(operands.sinks, size),
        ),
        mask=replace(
            mask,
            query_lengths=None if mask.query_lengths is None else mask.query_lengths * size.G,
            query_segments=None if mask.query_segments is None else jnp.repeat(mask.query_segments, size.G, axis=1),
        ),
    )


def _pack_heads(x: Float[Array, " N"] | None, size: Sizes) -> Float[Array, "K TG"] | None:
    return None if x is None else jnp.tile(x.astype(jnp.float32).reshape(size.K, size.G), (1, size.T))


def unpack(x: Float[Array, "B TG K X"], size: Sizes) -> Float[Array, "B T N X"]:
    return x.reshape(size.B, size.T, size.G, size.K, -1).swapaxes(2, 3).reshape(size.B, size.T, size.N, -1)
