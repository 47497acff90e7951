"""Detects wrappers that change the weights or the results of a torch layer, by names and types, and refuses them."""

import re
import warnings
from typing import Any

# Patterns of tensor names, and how to remove the wrapper.
WRAPPED = {
    r"(^|\.)parametrizations\.": "torch.nn.utils.parametrize.remove_parametrizations(part, 'weight')",
    r"weight_[gv]$": "torch.nn.utils.remove_weight_norm(part)",
    r"weight_(orig|mask|u)$": "torch.nn.utils.prune.remove(part, 'weight'), or remove_spectral_norm(part)",
    r"lora_|(^|\.)base_layer\.": "PEFT's model.merge_and_unload()",
    r"(^|\.)_orig_mod\.": "the layer that torch.compile was given, layer._orig_mod",
    r"_packed_params|\.(SCB|absmax|quant_map|qweight|qzeros|weight_scale)": "the layer before it was quantised",
}
PLAIN = ("Tensor", "Parameter", "Buffer")


def check(module: Any) -> None:
    """Raises if the tensors in a layer's state dict are not its plain weights in memory."""
    kind, state = type(module).__name__, module.state_dict()
    for pattern, remedy in WRAPPED.items():
        names = [name for name in state if re.search(pattern, name)]
        if names:
            raise NotImplementedError(f"The weights of this {kind} are not only its tensors: {names}. Use {remedy}.")
    if not hasattr(module, "named_modules"):  # an object with only a state dict
        return
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    types = {name: type(x).__name__ for name, x in tensors.items() if type(x).__name__ not in PLAIN}
    if types:
        raise NotImplementedError(
            f"Only plain tensors are read: this {kind} has {types}. Dequantise or gather them first."
        )
    absent = [name for name, x in tensors.items() if x.is_meta]
    if absent:
        raise ValueError(f"The weights of this {kind} are not in memory: device='meta' of {absent}. Load them first.")
    changed = [name or "the layer" for name, part in module.named_modules() if _is_changed(part)]
    if changed:
        warnings.warn(
            f"Hooks and replaced forward methods are not converted, and this {kind} has some in {changed}: if they "
            "change its results, the Flax module differs. Compare them with mqa_jax.torch_interop.parity.compare.",
            stacklevel=3,
        )


def _is_changed(part: Any) -> bool:
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return any(hooks) or hasattr(part, "_hf_hook")


def rotary(module: Any) -> list[str]:
    """The parts of a layer whose classes are called rotary embeddings."""
    if not hasattr(module, "named_modules"):
        return []
    return [
        name for name, part in module.named_modules() if re.search("rotary|rope", type(part).__name__, re.IGNORECASE)
    ]
