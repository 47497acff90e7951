"""Attention over a sequence that is cut over devices, and how arrays are cut over meshes:

zigzag           an order of the tokens that gives every device as much work under a causal mask
chunks           what a device has, and attention of a part of it to a part of the keys as an ordinary problem
strategies       how keys and values get to the queries, and their gradients back: in a ring, or gathered
ring             attention inside of `jax.shard_map`, with its derivative
attention        attention of whole arrays
decode           few queries, on all devices, to keys that are cut
partition_specs  how parameters and caches of modules are cut
"""
