"""Attention on several devices, and how its arrays are cut over them: `partition_specs`."""
