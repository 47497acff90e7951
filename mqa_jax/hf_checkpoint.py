"""The former import path of `mqa_jax.torch_interop.hugging_face.checkpoint`."""

from mqa_jax.torch_interop.hugging_face.checkpoint import Checkpoint as Checkpoint
