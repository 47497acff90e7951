"""The name that `kernels.gpu.assuming` had first."""

from mqa_jax.kernels.gpu import assuming as assuming
