"""The attention modules of `flax.linen`: parameters and the `cache` collection are variables of the module's scope."""

from mqa_jax.linen.attention import Attention as Attention
from mqa_jax.linen.attention import GroupedQueryAttention as GroupedQueryAttention
from mqa_jax.linen.attention import MultiHeadAttention as MultiHeadAttention
from mqa_jax.linen.attention import MultiQueryAttention as MultiQueryAttention
from mqa_jax.linen.attention_fn import attention_fn as attention_fn
from mqa_jax.linen.flash import FlashAttention as FlashAttention
from mqa_jax.linen.flash import FlashMHA as FlashMHA
from mqa_jax.linen.init_cache import init_cache as init_cache
