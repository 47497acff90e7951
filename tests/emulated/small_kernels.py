"""Kernels of a few instructions, and what the emulator makes of them."""

import importlib.util
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("numba") is None:
    pytest.skip("the extra `emulate` (numba) is not installed", allow_module_level=True)
from ptx_emulator.launch import KernelFault, run

WORDS = np.random.default_rng(0).integers(0, 1 << 32, 128, dtype=np.uint32)
WORDS[:8] = 0, 1, 0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 31, 32, 0xFF
OTHER = np.roll(WORDS, 7)
with np.errstate(all="ignore"):
    FLOATS = np.array(
        [0, -0.0, 1, -1.5, 2.5, 1e-40, -1e-40, 3e38, np.inf, -np.inf, np.nan, 1 + 2**-23, 65519, 0.5, 449],
        np.float32,
    )
    FLOATS = np.concatenate([FLOATS, np.random.default_rng(1).standard_normal(113).astype(np.float32) * 100])


BARRIER = "bar.sync 0;"


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def kernel(body: str, arguments: int, threads: int = 128) -> str:
    """%a0, %a1 ... point at the arguments; %i is the thread, %o four times that; %r, %f, %h, %d, %p are free."""
    names = [f"k_param_{n}" for n in range(arguments)]
    return f"""
    .version 8.7
    .target sm_90a
    .extern .shared .align 16 .b8 smem[];
    .visible .entry k({", ".join(f".param .u64 .ptr .align 16 {name}" for name in names)})
    .reqntid {threads}, 1, 1
    {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .b64 %d<9>; .reg .b64 %a<9>;
        .reg .b32 %i; .reg .b64 %o; .reg .b32 %s;
        {" ".join(f"ld.param.b64 %a{n}, [{name}];" for n, name in enumerate(names))}
        mov.u32 %i, %tid.x; mul.wide.u32 %o, %i, 4; mov.b32 %s, smem;
        {body}
        ret;
    }}"""


def emulate(
    body: str, *inputs: np.ndarray, shape: Any = 128, dtype: Any = np.uint32, grid=(1,), **more: Any
) -> np.ndarray:
    threads, together = more.get("threads", 128), more.get("together", 4096)
    text = kernel(body, len(inputs) + 1, threads)
    (result,) = run(text, grid, 4096, list(inputs), [(np.atleast_1d(shape), np.dtype(dtype))], together)
    return result


def load(register: str, argument: int = 0) -> str:
    return f"add.s64 %d8, %a{argument}, %o; ld.global.b32 {register}, [%d8];"


def store(register: str, argument: int) -> str:
    return f"add.s64 %d8, %a{argument}, %o; st.global.b32 [%d8], {register};"


def faults(body: str, *inputs: np.ndarray, **more: Any) -> set[str]:
    with pytest.raises(KernelFault) as caught:
        emulate(body, *inputs, **more)
    return caught.value.faults.kinds()
