"""Attention on several devices, and how its arrays are cut over them."""

from mqa_jax.sharded.partition_specs import partition_specs as partition_specs
