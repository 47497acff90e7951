"""Attention in PyTorch: its SDPA, with the kernel it chooses itself or one that is named, and its FlexAttention.

PyTorch is imported where it is used: it may be absent. Its tensors are `[B, N, T, H]`.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import mqa_jax
from benchmarks import environment, timing
from benchmarks.candidate import Candidate, NotApplicable
from benchmarks.peers.jax_attention import KEPT, random_arrays, repeats, without_gradients
from benchmarks.problems import Problem

Attend = Callable[..., Any]  # query, key, value


@functools.lru_cache(maxsize=KEPT)
def tensors_of(problem: Problem, device: str) -> list[Any]:
    """Query, key, value and the weights of the output, each contiguous."""
    import torch

    move = lambda array: torch.from_numpy(array).to(device, getattr(torch, problem.dtype)).transpose(1, 2).contiguous()
    arrays = zip(random_arrays(problem), problem.shapes())
    repeated = [(move(array), repeats(array, shape)) for array, shape in arrays]
    return [tensor.repeat(batch, heads, length, 1) for tensor, (batch, length, heads, _) in repeated]


def device_at_hand() -> str:
    """PyTorch's name of it. Threads are as many as XLA has."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if jax.default_backend() == "gpu":
        raise NotApplicable("this PyTorch has no CUDA")
    torch.set_num_threads(environment.usable_cores())
    return "cpu"


def outputs_of(attend: Attend, gradients: bool, query: Any, key: Any, value: Any, weights: Any) -> tuple[Any, ...]:
    """The output, and the gradients if they are wanted."""
    import torch

    if not gradients:
        with torch.inference_mode():
            return (attend(query, key, value),)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, weights)


def candidate_of(run: Callable[[], tuple[Any, ...]], device: str, compile_seconds: float | None = None) -> Candidate:
    """Costs seconds a call. Memory is known on a GPU alone: what is allocated at the peak, without the results."""
    import torch

    temporaries = None
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = run()
        torch.cuda.synchronize()
        size = sum(tensor.nbytes for tensor in kept)
        temporaries = torch.cuda.max_memory_allocated() - before - size
    finish = lambda result: torch.cuda.synchronize() if device == "cuda" else None
    cost = functools.partial(timing.seconds_per_call, run, finish=finish)
    outputs = lambda: [tensor.transpose(1, 2).float().cpu().numpy() for tensor in run()]
    return Candidate(outputs, cost, compile_seconds, temporaries)


def sdpa(problem: Problem, backend: str | None = None, same_layout: bool = False) -> Candidate:
    """By a backend it takes what that knows by name, else also masks and biases; on tensors that are contiguous, or,
    with `same_layout`, on ours seen through a transpose.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    problem.needs_no("key_dtype")
    if problem.dropout:
        raise NotApplicable("it drops other weights, so its numbers cannot be checked")
    if backend:
        problem.needs_no("window", "alibi", "documents")
    device = device_at_hand()
    tensors = tensors_of(without_gradients(problem), device)
    if same_layout:
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    named = problem.window is None and not problem.alibi and problem.documents == 1
    named = named and not (problem.is_causal and problem.continues)  # it counts positions from 0
    attend: Any = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        attn_mask=None if named else mask_of(problem, device),
        is_causal=problem.is_causal and named,
        enable_gqa=problem.heads != problem.kv_heads,
    )

    def run() -> tuple[Any, ...]:
        if backend is None:
            return outputs_of(attend, problem.gradients, *tensors)
        with sdpa_kernel(getattr(SDPBackend, f"{backend}_ATTENTION")):
            return outputs_of(attend, problem.gradients, *tensors)

    return candidate_of(run, device)


def mask_of(problem: Problem, device: str) -> Any:
    """What is hidden, or, where something is added to scores, both in one."""
    import torch

    mask, bias = problem.mask(), problem.bias()
    left = None if mask is None else torch.from_numpy(np.array(mask)).to(device)
    if bias is None:
        return left
    added = torch.from_numpy(np.array(bias)).to(device, getattr(torch, problem.dtype))
    return added if left is None else added.masked_fill(~left, -torch.inf)


def flex(problem: Problem) -> Candidate:
    """FlexAttention, compiled, with all the problem hides as a block mask and ALiBi as a change of scores.

    On a CPU it wants a C++ compiler, and has no backward pass.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    problem.needs_no("dropout", "key_dtype")
    device = device_at_hand()
    if device == "cpu" and problem.gradients:
        raise NotApplicable("it has no backward pass on CPUs")
    tensors = tensors_of(without_gradients(problem), device)
    before, each = problem.keys - problem.queries, -(-problem.queries // problem.documents)
    window = problem.keys if problem.window is None else problem.window

    def visible(batch: Any, head: Any, row: Any, column: Any) -> Any:
        distance = row + before - column
        left = (distance >= 0) & (distance < window)
        return left & (row // each == column // each) if problem.documents > 1 else left

    slopes = torch.from_numpy(np.array(mqa_jax.alibi_slopes(problem.heads))).to(device)
    fall = lambda score, batch, head, row, column: score - slopes[head] * (row + before - column).abs()
    hides = problem.is_causal or problem.window is not None or problem.documents > 1
    blocks = create_block_mask(visible, None, None, problem.queries, problem.keys, device) if hides else None
    torch._dynamo.reset()  # or the programs of other problems count against the most it keeps
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    attend = functools.partial(
        compiled,
        score_mod=fall if problem.alibi else None,
        block_mask=blocks,
        enable_gqa=problem.heads != problem.kv_heads,
    )
    run = functools.partial(outputs_of, attend, problem.gradients, *tensors)
    start = time.perf_counter()
    run()
    return candidate_of(run, device, time.perf_counter() - start)


def peers_for(problem: Problem, device: str, with_flex: bool) -> Mapping[str, Callable[[Problem], Candidate]]:
    """On "cpu" or "gpu", where PyTorch's kernel for float32 is another one. FlexAttention takes long to compile."""
    peers: dict[str, Callable[[Problem], Candidate]] = {}
    if device == "cpu":
        peers["torch"] = sdpa
        if problem.queries == 1:
            peers["torch, our cache layout"] = functools.partial(sdpa, same_layout=True)
    else:
        backends = ["EFFICIENT"] if problem.dtype == "float32" else ["FLASH", "CUDNN"]
        peers |= {f"torch {backend.lower()}": functools.partial(sdpa, backend=backend) for backend in backends}
    return peers | ({"torch flex": flex} if with_flex else {})
