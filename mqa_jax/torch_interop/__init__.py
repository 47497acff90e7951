"""Conversion from and to PyTorch: attention layers, their weights, and arrays. All public functions are here.

    from_torch(layer) -> module, variables             a live layer as a Flax module
    to_torch(module, variables, like=layer)            Flax parameters in a copy of a live layer
    from_state_dict(...), to_state_dict(...)           only weights; torch need not be installed
    to_jax(tensor), to_tensor(array)                   arrays, by DLPack
    past_key_value_from_torch(key, value, kv_heads)    upstream's caches
    interleaved_to_halves, halves_to_interleaved       rotary conventions of weights

`mqa_jax.hf_checkpoint` reads checkpoints on disk, and `mqa_jax.parity` compares a converted layer with its original.
"""

from mqa_jax.torch_interop.arrays import to_jax as to_jax
from mqa_jax.torch_interop.arrays import to_tensor as to_tensor
from mqa_jax.torch_interop.modules import from_torch as from_torch
from mqa_jax.torch_interop.modules import to_torch as to_torch
from mqa_jax.torch_interop.state_dict import from_state_dict as from_state_dict
from mqa_jax.torch_interop.state_dict import halves_to_interleaved as halves_to_interleaved
from mqa_jax.torch_interop.state_dict import interleaved_to_halves as interleaved_to_halves
from mqa_jax.torch_interop.state_dict import past_key_value_from_torch as past_key_value_from_torch
from mqa_jax.torch_interop.state_dict import to_state_dict as to_state_dict
