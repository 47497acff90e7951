"""What the torch layer of a comparison computes."""

import copy
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mqa_jax.linen import GroupedQueryAttention
from mqa_jax.torch_interop import arrays, layouts, modules


def chunks_of(x: Any, prompt: int) -> list[Any]:
    return [x[:, :prompt], *(x[:, i : i + 1] for i in range(prompt, x.shape[1]))]


class TorchLayer:
    """The torch layer of a comparison, and the Flax module it is compared with."""

    def __init__(self, module: Any, call: Callable[..., Any], layout: str | None, flax: GroupedQueryAttention):
        self.module, self.call, self.flax = copy.deepcopy(module).eval(), call, flax
        heads, kv_heads = flax.heads, flax.kv_heads or flax.heads
        layout = modules.layout_of(module, layout)
        self.layout, self.known = layouts.find(layout, module.state_dict(), heads, kv_heads)
        self.out_features = flax.out_features or (
            flax.dim if flax.output_projection else flax.heads * (flax.head_dim or 0)
        )

    @property
    def dtype(self) -> Any:
        return next(self.module.parameters()).dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def in_float64(self) -> "TorchLayer":
        return TorchLayer(copy.deepcopy(self.module).double(), self.call, self.layout, self.flax)

    @property
    def shows_context(self) -> bool:
        """Whether the input of its output projection is the context of the Flax module."""
        return self.known.out is not None and self.known.folded is None

    def weights(self) -> dict[str, jax.Array]:
        state = self.module.state_dict()
        return {name: arrays.to_jax(x) for name, x in state.items() if name in self.known.names}

    def tensor(self, x: np.ndarray) -> Any:
        import torch

        return torch.tensor(x, dtype=self.dtype)

    def results(self, x: np.ndarray, cotangent: np.ndarray) -> dict[str, np.ndarray]:
        seen: dict[str, Any] = {}
        given = self.tensor(x).requires_grad_()
        if self.shows_context:  # the module is a copy, so the hook may stay
            projection = self.module.get_submodule(self.known.out)
            projection.register_forward_pre_hook(lambda _, arguments: seen.update(context=arguments[0]))
        out = self.call(self.module, given)
        out.backward(self.tensor(cotangent))
        weights = {name: x.grad for name, x in self.module.named_parameters() if name in self.known.names}
        found = {"output": out, "d_x": given.grad, **{f"d_{name}": gradient for name, gradient in weights.items()}}
        return {name: x.detach().double().numpy() for name, x in (seen | found).items()}

    def decoded(self, x: np.ndarray, prompt: int) -> np.ndarray:
        """The outputs with torch's own cache, or, if `calls` does not support one, of the full pass."""
        import torch

        from mqa_jax.torch_interop import calls

        cache = calls.new_cache(self.module)
        chunks = [x] if cache is None else chunks_of(x, prompt)
        with torch.no_grad():
            outputs = [self.call(self.module, self.tensor(chunk), cache) for chunk in chunks]
        return torch.cat(outputs, dim=1).double().numpy()
