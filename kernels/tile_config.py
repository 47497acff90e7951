"""The former import path of `kernels.gpu.assuming`."""

from mqa_jax.kernels.gpu import assuming as assuming
