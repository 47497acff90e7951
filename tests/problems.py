"""Random calls of attention for property tests: any combination of options on small awkward shapes."""

from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import strategies as st

HEADS = [(4, 4), (6, 3), (4, 1), (1, 1), (7, 1)]  # (query, key/value): MHA, GQA, MQA, one head, an odd group


# Lengths that are no multiple of any tile, head sizes that are no power of two, any number of heads in a group.
FOR_PRECISION: list[dict[str, Any]] = [
    dict(batch=(1,), rows=113, columns=203, heads=6, kv_heads=2, features=80),
    dict(batch=(1,), rows=239, columns=239, heads=4, kv_heads=4, features=64, is_causal=True),
    dict(batch=(1,), rows=97, columns=97, heads=71, kv_heads=1, features=16, is_causal=True),
    dict(batch=(1,), rows=17, columns=1501, heads=4, kv_heads=1, features=64),  # errors that grow with every tile
    dict(
        batch=(1,),
        rows=127,
        columns=131,
        heads=8,
        kv_heads=1,
        features=40,
        value_features=24,
        logits_soft_cap=5.0,
        scale=0.3,
    ),
    dict(  # slopes as ALiBi has them, and sinks, in the precision of all else, as a model in bfloat16 holds them
        batch=(2,),
        rows=89,
        columns=151,
        heads=6,
        kv_heads=2,
        features=24,
        is_causal=True,
        query_offset=62,
        alibi_slopes=np.array([0.5, 0.25, 0.125, 0.0625, 0.03, 0.01], np.float32),
        sinks=np.array([0.3, -1.1, 2.3, 0.0, -4.0, 1.7], np.float32),
    ),
]


# Many keys, whose weights times their scales are smaller than float16 can hold; and a head size in two pieces.
_MANY_KEYS = dict(batch=(1,), rows=2, columns=3001, heads=16, kv_heads=1, features=64)
_TWO_PIECES = dict(batch=(2,), rows=16, columns=203, heads=6, kv_heads=2, features=80)
FOR_PRECISION_IN_8_BITS: list[tuple[Any, str, dict[str, Any]]] = [
    (jnp.float16, "int8", _MANY_KEYS),
    (jnp.bfloat16, "float8_e4m3fn", _MANY_KEYS),
    (jnp.float16, "float8_e4m3fn", _TWO_PIECES),
    (jnp.bfloat16, "int8", _TWO_PIECES),
]


# bfloat16 everywhere; the others where a tile boundary, a group or many tiles could make a difference.
FOR_PRECISION_IN_DTYPES = [
    *((jnp.bfloat16, sizes) for sizes in FOR_PRECISION),
    *((dtype, FOR_PRECISION[number]) for dtype in (jnp.float16, jnp.float32) for number in (0, 3)),
    (jnp.float32, FOR_PRECISION[2]),
]


@st.composite
def problems(draw):
    """Any combination of options on small awkward shapes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    batch = draw(st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]))
    rows, columns = draw(st.sampled_from([1, 2, 5, 13, 37])), draw(st.sampled_from([1, 3, 11, 16, 41]))
    heads, kv_heads = draw(st.sampled_from(HEADS))
    size = int(np.prod(batch, dtype=int))
    chance = lambda: draw(st.booleans())
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    integers = lambda low, high, *shape: jnp.asarray(rng.integers(low, high, shape), jnp.int32)

    def shared(*shape):
        """Some axes of a bias or mask are shared."""
        return tuple(1 if draw(st.booleans()) else n for n in shape)

    pairs = (*batch, heads, rows, columns)
    options: dict[str, Any] = {}
    if chance():
        options["is_causal"] = True
    if chance():
        low, high = -rows, columns
        options["query_offset"] = integers(low, high, *batch) if chance() else int(rng.integers(low, high))
    if chance():
        options["key_value_ring_lengths"] = integers(0, 3 * columns, *batch)
        options["query_offset"] = jnp.maximum(options["key_value_ring_lengths"] - rows, 0)
    elif chance():
        options["key_value_seq_lengths"] = integers(0, columns + 1, *batch)
    if chance():
        options["local_window_size"] = draw(st.sampled_from([0, 3, (5, 0), (0, 4), (40, 2)]))
    if chance():
        options["query_seq_lengths"] = integers(0, rows + 1, *batch)
    if chance():
        options["query_segment_ids"] = jnp.sort(integers(0, 3, *batch, rows))
        options["key_value_segment_ids"] = jnp.sort(integers(0, 3, *batch, columns))
    if chance():
        options["mask"] = normal(*shared(*pairs)) > -0.5
    if chance():
        options["bias"] = normal(*shared(*pairs))
    if chance():
        options["logits_soft_cap"] = 1.5
    if chance():
        options["alibi_slopes"] = normal(heads) / 8
    if chance():
        options["sinks"] = normal(heads)
    if chance():
        options["dropout_rate"], options["dropout_rng"] = 0.25, jax.random.key(int(rng.integers(99)))
    if chance():
        options["scale"] = 0.3
    hypothesis.event(f"{len(options)} options, {size * rows * columns} pairs")
    return oracle.random_problem(
        rng,
        batch=batch,
        rows=rows,
        columns=columns,
        heads=heads,
        kv_heads=kv_heads,
        features=draw(st.sampled_from([5, 8, 40])),
        value_features=draw(st.sampled_from([8, 3, 24])),
        **options,
    )
