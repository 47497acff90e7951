"""Programs lowered for a GPU that is not there, and which of our kernels are in them."""

import re
from typing import Any

import jax

from benchmarks import gpu_compile
from mqa_jax.kernels import tile_config


def lowered_for_cuda(function: Any, *arguments: Any, target: str = "h100") -> Any:
    gpu = gpu_compile.TARGETS[target]
    with tile_config.assuming(gpu.architecture), gpu_compile.lowering_for(gpu):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))


def kernels_in(text: str) -> list[str]:
    return sorted(re.findall(r'name = "(mqa_[a-z]+)', text))
