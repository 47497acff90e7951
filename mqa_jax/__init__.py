"""Multi-query and grouped-query attention for JAX and Flax. Everything public is listed here."""

import importlib
import typing

from mqa_jax import functions as functions
from mqa_jax.attention import dot_product_attention as dot_product_attention
from mqa_jax.cache.rows import cache_bytes as cache_bytes
from mqa_jax.cache.rows import check_cache as check_cache
from mqa_jax.cache.rows import reorder_cache as reorder_cache
from mqa_jax.cache.rows import reset_cache as reset_cache
from mqa_jax.layer.cut_sequence import SequenceAxis as SequenceAxis
from mqa_jax.linen import Attention as Attention
from mqa_jax.linen import FlashAttention as FlashAttention
from mqa_jax.linen import FlashMHA as FlashMHA
from mqa_jax.linen import GroupedQueryAttention as GroupedQueryAttention
from mqa_jax.linen import MultiHeadAttention as MultiHeadAttention
from mqa_jax.linen import MultiQueryAttention as MultiQueryAttention
from mqa_jax.linen import attention_fn as attention_fn
from mqa_jax.linen import init_cache as init_cache
from mqa_jax.partials import merge_partials as merge_partials
from mqa_jax.positions import LinearScaling as LinearScaling
from mqa_jax.positions import Llama3Scaling as Llama3Scaling
from mqa_jax.positions import Rope as Rope
from mqa_jax.positions import TableScaling as TableScaling
from mqa_jax.positions import TemperatureTuning as TemperatureTuning
from mqa_jax.positions import YarnScaling as YarnScaling
from mqa_jax.positions import alibi_slopes as alibi_slopes
from mqa_jax.quantization import dequantize as dequantize
from mqa_jax.quantization import quantize as quantize
from mqa_jax.sharded.attention import ring_attention as ring_attention
from mqa_jax.sharded.attention import sharded_attention as sharded_attention
from mqa_jax.sharded.decode import append_to_part as append_to_part
from mqa_jax.sharded.decode import decode_attention as decode_attention
from mqa_jax.sharded.partition_specs import partition_specs as partition_specs
from mqa_jax.sharded.zigzag import unzigzag as unzigzag
from mqa_jax.sharded.zigzag import zigzag as zigzag
from mqa_jax.sharded.zigzag import zigzag_positions as zigzag_positions

__version__ = "0.1.0"


def __getattr__(name: str) -> "typing.Any":
    """`mqa_jax.nnx`, which loads `flax.nnx`, not before it is used."""
    if name == "nnx":
        return importlib.import_module("mqa_jax.nnx")
    raise AttributeError(f"module 'mqa_jax' has no attribute {name!r}")
