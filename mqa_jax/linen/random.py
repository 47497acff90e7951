"""The random keys of linen modules."""

import flax.linen as nn
from jaxtyping import Array


def dropout_key(module: nn.Module, deterministic: bool | None) -> Array | None:
    """A key of the `dropout` collection; None without dropout. The module or the call says `deterministic`."""
    if nn.merge_param("deterministic", module.deterministic, deterministic):
        return None
    return module.make_rng("dropout")
