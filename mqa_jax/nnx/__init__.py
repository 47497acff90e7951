"""The attention modules of `flax.nnx`: settings, calls, results and parameters are those of the linen ones.

    from mqa_jax import nnx as mqa_nnx

They work in graph mode and in tree mode. Linen modules under `nnx.bridge.ToNNX` do not work in tree mode.
"""

from mqa_jax.nnx.attention import Attention as Attention
from mqa_jax.nnx.attention import GroupedQueryAttention as GroupedQueryAttention
from mqa_jax.nnx.attention import MultiHeadAttention as MultiHeadAttention
from mqa_jax.nnx.attention import MultiQueryAttention as MultiQueryAttention
from mqa_jax.nnx.cache import cache_bytes as cache_bytes
from mqa_jax.nnx.cache import check_cache as check_cache
from mqa_jax.nnx.cache import decoding_step as decoding_step
from mqa_jax.nnx.cache import init_cache as init_cache
from mqa_jax.nnx.cache import reorder_cache as reorder_cache
from mqa_jax.nnx.cache import reset_cache as reset_cache
from mqa_jax.nnx.flash import FlashAttention as FlashAttention
from mqa_jax.nnx.flash import FlashMHA as FlashMHA
from mqa_jax.nnx.parameters import from_linen as from_linen
from mqa_jax.nnx.parameters import to_linen as to_linen
from mqa_jax.nnx.parameters import to_nnx as to_nnx
from mqa_jax.nnx.parameters import with_params as with_params
