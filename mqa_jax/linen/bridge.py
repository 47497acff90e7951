"""What `flax.nnx.bridge.ToNNX` cannot do with the cache of a linen module."""

import sys
from typing import Any

import jax
from jaxtyping import Array

from mqa_jax.layer.tree_mode import is_tree_mode


def check_bridge(cached: Array) -> None:
    """ToNNX keeps a cache by assigning attributes, which tree mode loses: every step would start from the first token.

    Linen does not know that it is called by NNX, so this looks at who calls.
    """
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is None or not isinstance(cached, jax.core.Tracer) or not is_tree_mode(nnx):
        return
    frame = sys._getframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), nnx.bridge.ToNNX):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None:
        raise NotImplementedError(
            "In tree mode nnx.bridge.ToNNX loses a cache that is written inside a transformation: "
            "nnx.set_graph_mode(False) or nnx.set_graph_updates(False). Use the modules of mqa_jax.nnx."
        )
