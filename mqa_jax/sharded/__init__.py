"""Attention over a sequence that is cut over devices, and how arrays are cut over meshes:

attention        `sharded_attention` of whole arrays, `ring_attention` inside of `jax.shard_map`
ring             the passes that a device computes: forward, tangent, backward
strategies       how keys and values get to the queries, and their gradients back: in a ring, or gathered
chunks           what a device has, and attention of a part of it to a part of the keys as an ordinary problem
zigzag           an order of the tokens in which devices have equal work under a causal mask
decode           few queries, on all devices, to keys that are cut
on_mesh          what a device computes of whole arrays on a mesh
checks           the errors of all of these
partition_specs  how parameters and caches of modules are cut
"""
