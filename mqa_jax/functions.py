"""Ready-made `score_fn` and `mask_fn` of `mqa_jax.dot_product_attention`, which are also examples of how to write one.

    mqa_jax.dot_product_attention(q, k, v, score_fn=(mqa_jax.functions.t5_causal, table))
    mqa_jax.dot_product_attention(q, k, v, mask_fn=(mqa_jax.functions.prefix, lengths), local_window_size=...)

A `score_fn` is called with `(score, batch, head, query, key, *arrays)`, a `mask_fn` with `(batch, head, query, key,
*arrays)`; both combine with every other option. What they are called with:

    score   float32 (float64 for float64 queries): scale * q . k after the soft cap, before bias and ALiBi are added
    batch   number of the batch row, from 0; of several leading axes the number in row-major order. Under `jax.vmap` it
            counts the rows of one call: an axis that is mapped over is not seen
    head    number of the query head
    query   position of the query, `query_offset + t`
    key     position of the key: its index, or in a ring buffer what `mqa_jax.masks` says, which is negative in slots
            that were never written
    arrays  as given; floating point ones in the dtype of the score, Python numbers as arrays `[]`

All but the arrays are integers of 32 bits, or tiles of them, in shapes that broadcast; a function must not depend on
these shapes. Rules:

* It is elementwise: arithmetic, comparisons, `jnp.where`. It gives a finite score, and a finite derivative, for every
  pair, also for those that a mask hides; `jnp.where(condition, score, -jnp.inf)` is the exception.
* It reads arrays by one integer for each axis, `table[head, key - query]`, and not inside of a `jax.jit` of its own.
  As always in JAX, a negative index counts from the end and one beyond the end means the last entry. A GPU kernel
  reads arrays in no other way, and `implementation=None` runs a function that does, or that needs an operation
  without a rule in Pallas-Triton, in plain XLA instead.
* It reads nothing but its arguments. An array of an enclosing function is refused: pass it along, then it has a
  gradient.
* It is defined in a module. JAX compiles a program for each function: one that is made anew for each call, like a
  lambda in a loop, is compiled anew for each call outside of `jax.jit`.

Floating point arrays of a score_fn are differentiable. Their gradients are sums over all pairs; the Triton kernels
leave them to plain XLA, in a pass that runs only if they are asked for. Masks are drawn with 1 = may attend.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

T5_MAX_DISTANCE = 128  # of all published T5 models


# -- scores -----------------------------------------------------------------------------------------------------------


def scaled(score: Array, batch: Array, head: Array, query: Array, key: Array, factors: Float[Array, " N"]) -> Array:
    """A factor for each head, such as a learned temperature."""
    return score * factors[head]


def t5(score: Array, batch: Array, head: Array, query: Array, key: Array, table: Float[Array, "buckets N"]) -> Array:
    """T5's relative positions in an encoder (Raffel et al. 2020, arXiv 1910.10683, section 2.1). T5 has scale=1.

    Half of the buckets are for keys after the query; `table` is T5's `relative_attention_bias.weight`.
    """
    half = table.shape[0] // 2
    bucket = _t5_bucket(jnp.abs(key - query), half) + jnp.where(key > query, half, 0)
    return score + table[bucket, head]


def t5_causal(
    score: Array, batch: Array, head: Array, query: Array, key: Array, table: Float[Array, "buckets N"]
) -> Array:
    """The same in a decoder, where no key is after the query."""
    return score + table[_t5_bucket(jnp.maximum(query - key, 0), table.shape[0]), head]


def _t5_bucket(distance: Array, buckets: int) -> Array:
    """One for each short distance, then logarithmic up to T5_MAX_DISTANCE."""
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, exact).astype(jnp.float32) / exact) / math.log(T5_MAX_DISTANCE / exact)
    # A whole number, as 2 for a distance of 2 * exact, may come out a little smaller.
    logarithmic = exact + jnp.floor(ratio * (buckets - exact) + 1e-4).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(logarithmic, buckets - 1))


# -- masks ------------------------------------------------------------------------------------------------------------


def prefix(batch: Array, head: Array, query: Array, key: Array, lengths: Int[Array, " B"]) -> Array:
    """Causal, and a beginning of each row that all of its queries see (prefix-LM). With `lengths` of 3:

    1 1 1 0 0
    1 1 1 0 0
    1 1 1 0 0
    1 1 1 1 0
    1 1 1 1 1
    """
    return (key <= query) | (key < lengths[batch])


def documents(batch: Array, head: Array, query: Array, key: Array, ids: Int[Array, "B S"]) -> Array:
    """Only keys of the same document, by the id of each position. With `ids` of 0 0 1 1 1:

    1 1 0 0 0
    1 1 0 0 0
    0 0 1 1 1
    0 0 1 1 1
    0 0 1 1 1
    """
    return ids[batch, query] == ids[batch, key]


def dilated(batch: Array, head: Array, query: Array, key: Array, step: Int[Array, ""]) -> Array:
    """Causal, every `step`-th key back from the query (Child et al. 2019, arXiv 1904.10509). With a step of 2:

    1 0 0 0 0
    0 1 0 0 0
    1 0 1 0 0
    0 1 0 1 0
    1 0 1 0 1
    """
    return (key <= query) & ((query - key) % step == 0)


def neighbourhood(
    batch: Array, head: Array, query: Array, key: Array, width: Int[Array, ""], radius: Int[Array, ""]
) -> Array:
    """Pixels of an image of that width, row by row, that are at most `radius` rows and columns apart.

    An image of 2 x 3 pixels with a radius of 1:

        1 1 0 1 1 0
        1 1 1 1 1 1
        0 1 1 0 1 1
        1 1 0 1 1 0
        1 1 1 1 1 1
        0 1 1 0 1 1
    """
    near_rows = jnp.abs(query // width - key // width) <= radius
    return near_rows & (jnp.abs(query % width - key % width) <= radius)


def sink_and_window(
    batch: Array, head: Array, query: Array, key: Array, sinks: Int[Array, ""], window: Int[Array, ""]
) -> Array:
    """The first keys, and the last ones up to the query (Xiao et al. 2024, arXiv 2309.17453). 1 and 2 of them:

    1 0 0 0 0
    1 1 0 0 0
    1 1 1 0 0
    1 0 1 1 0
    1 0 0 1 1
    """
    return (key <= query) & ((key < sinks) | (query - key < window))


def tree(
    batch: Array, head: Array, query: Array, key: Array, start: Int[Array, " B"], ancestors: Bool[Array, "X X"]
) -> Array:
    """Draft tokens that form a tree, behind `start` keys that all of them see (Miao et al. 2024, arXiv 2305.09781).

    `ancestors[i, j]`: draft token i continues j, or is j. After 2 keys, tokens 1 and 2 that both continue 0, and 3,
    which continues 2; with `query_offset` = start:

        1 1 1 0 0 0
        1 1 1 1 0 0
        1 1 1 0 1 0
        1 1 1 0 1 1
    """
    first = start[batch]
    return (key < first) | ((key >= first) & ancestors[jnp.maximum(query - first, 0), jnp.maximum(key - first, 0)])
