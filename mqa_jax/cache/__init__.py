"""The cache of an attention module: Flax's mutable `cache` collection in linen, `nnx.Cache` variables in NNX.

    cached_key          [batch, length, kv_heads, head_dim]    after norm and RoPE
    cached_value        [batch, length, kv_heads, head_dim]
    cached_key_scale    float32 [batch, length, kv_heads]      where keys are in 8 bits (`mqa_jax.quantization`)
    cached_value_scale  float32 [batch, length, kv_heads]
    cache_index         int32 [batch]                          tokens written so far, which is the next position
    ring_index          int32 [batch]                          the same of a ring buffer, instead of cache_index
    other_calls         a tuple of such caches                 where one step calls the module more than once

The names are Flax's, where it has one. Rows are independent: each has its own index, so rows of one batch may be at
different positions. The index of a row is -1 once something went in that cannot be right and that nobody could refuse
under `jit`: more tokens than there were, a row of another batch. What such a row gives is NaN until it is reset.

A static cache has a place for each position up to `length`, and is full after that. A ring buffer is for a window: it
holds the latest tokens alone, position p in slot p modulo `length`, and any number of tokens goes through it (2**31).

A module that a model calls several times in one step, as ALBERT and Zamba do, needs a cache for each of these calls.
They stand in a queue: each call takes the first and puts it at the end, so the next step finds them in the same order.

`layout` makes and checks these arrays, `append` writes to them, `rows` reorders and resets their rows, and `checks`
reports what went wrong on a device.
"""
