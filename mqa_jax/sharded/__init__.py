"""Attention over a sequence that is cut over devices. The strategies are in `strategies`; what they share is here:

zigzag        an order of the tokens that gives every device as much work under a causal mask
chunks        what a device has, and attention of a part of it to a part of the keys as an ordinary problem
strategies    how keys and values get to the queries, and their gradients back: in a ring, or gathered
ring          attention inside of `jax.shard_map`, with its derivative
attention     attention of whole arrays
decode        few queries, on all devices, to keys that are cut
"""
