"""Flax's two ways of transforming modules of NNX."""

from typing import Any


def is_tree_mode(nnx: Any) -> bool:
    """Whether transformations give back the contents of variables alone. Before 0.12.6 `flax.nnx` had no such mode."""
    modes = [getattr(nnx, name, None) for name in ("set_graph_mode", "set_graph_updates")]
    return not all(mode is None or mode.current_value() for mode in modes)
