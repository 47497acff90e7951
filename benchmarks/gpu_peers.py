"""Attention on a GPU, by us and by others, and the rule that judges them: that of tests/oracle.py.

A peer says itself what it does not do, by raising `NotApplicable` when it is traced. Its program is compiled once for
each problem, and may be compiled in any thread.
"""

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import mqa_jax
from benchmarks import timing
from benchmarks.cases import Peers
from benchmarks.peers import Attention, Candidate, NotApplicable, jax_program, torch_results
from mqa_jax import reference
from mqa_jax.checks import checked_inputs
from mqa_jax.kernels import flash, triton
from mqa_jax.options import Options
from mqa_jax.shapes import positions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle

LENIENCE = 2
LARGEST_SCORES = 10 << 30  # bytes of one array of all scores; gradients take four of them


@dataclass(frozen=True)
class Problem(Attention):
    """Attention with what models do to it.

    Attributes:
      window: how many keys a query sees, its own included; None for all.
      alibi: whether scores fall with distance.
      documents: how many, all of one length, are packed into each row; they do not see each other.
      dropout: its rate.
      key_dtype: of keys and values, if not `dtype`; in 8 bits they come with scales.

    With fewer queries than keys it is a step of decoding: the last query sees the last key.
    """

    dtype: str = "bfloat16"
    window: int | None = None
    alibi: bool = False
    documents: int = 1
    dropout: float = 0.0
    key_dtype: str | None = None

    def __str__(self) -> str:
        words = [
            super().__str__(),
            "" if self.window is None else f"window={self.window}",
            "ALiBi" if self.alibi else "",
            f"documents={self.documents}" if self.documents > 1 else "",
            f"dropout={self.dropout}" if self.dropout else "",
            self.dtype if self.key_dtype is None else f"{self.dtype}/{self.key_dtype}",
        ]
        return " ".join(filter(None, words))

    @property
    def is_step(self) -> bool:
        return self.queries < self.keys

    def at_length(self, length: int) -> "Problem":
        """One row of this many tokens, or in decoding all rows; a window shrinks with them."""
        window = None if self.window is None else -(-self.window * length // self.keys)
        if self.is_step:
            return replace(self, keys=length, window=window)
        return replace(self, batch=1, queries=length, keys=length, window=window)

    def small(self, factor: int = 0) -> "Problem":
        """Small enough for interpret mode: fewer heads and features as well."""
        kv_heads = min(self.kv_heads, 2)
        heads = kv_heads * min(self.heads // self.kv_heads, 2)
        few = replace(self.at_length(40), batch=min(self.batch, 2) if self.is_step else 1)
        return replace(few, heads=heads, kv_heads=kv_heads, head_dim=self.head_dim // 4)

    @property
    def pairs(self) -> float:
        """Of a query and a key, in one head, that the mask leaves: about, as a causal one is said to leave half."""
        length = self.queries // self.documents
        whole = self.documents * length * (self.keys // self.documents)
        if self.window is not None:
            return self.queries * self.window - self.window**2 / 2
        return whole / 2 if self.is_causal else whole

    @property
    def flops(self) -> float:
        """Two products in the forward pass; in the backward pass five, as FlashAttention counts, whoever needs more."""
        forward = 4 * self.batch * self.heads * self.pairs * self.head_dim
        return 3.5 * forward if self.gradients else forward

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values, and of their scales, that a step of decoding has to read."""
        token = 2 * self.head_dim * jnp.dtype(self.key_dtype or self.dtype).itemsize + (8 if self.key_dtype else 0)
        return self.batch * min(self.keys, self.window or self.keys) * self.kv_heads * token

    @property
    def results(self) -> int:
        return 4 if self.gradients else 1

    def options(self) -> dict[str, Any]:
        """Of `mqa_jax.dot_product_attention`."""
        ids = self.ids() if self.documents > 1 else None
        return dict(
            is_causal=self.is_causal,
            local_window_size=self.sides(),
            query_offset=self.keys - self.queries,
            alibi_slopes=mqa_jax.alibi_slopes(self.heads) if self.alibi else None,
            query_segment_ids=ids,
            key_value_segment_ids=ids,
            dropout_rate=self.dropout,
            dropout_rng=jax.random.key(0) if self.dropout else None,
        )

    def sides(self) -> tuple[int, int] | None:
        return None if self.window is None else (self.window - 1, 0)

    def ids(self) -> Array:
        """Which document a token belongs to."""
        ids = positions(self.queries) // -(-self.queries // self.documents)
        return jnp.broadcast_to(ids, (self.batch, self.queries))

    def needs_no(self, *names: str) -> None:
        """Raises for the first of these options that the problem has."""
        defaults = Problem(1, 1, 1, 1, 1, 1)
        for name in names:
            if getattr(self, name) != getattr(defaults, name):
                raise NotApplicable(f"it has no {name}")


# -- numbers -----------------------------------------------------------------------------------------------------------


def without_gradients(problem: Problem) -> Problem:
    """The numbers of a problem are the same for both."""
    return replace(problem, gradients=False)


KEPT = 3  # problems: what is measured, what is checked, and that without dropout


LONGEST_CACHE = 16384  # the numbers of a longer one repeat, in each row: making them all would take minutes


@functools.lru_cache(maxsize=KEPT)
def random_arrays(problem: Problem) -> list[np.ndarray]:
    long = problem.is_step and problem.keys > LONGEST_CACHE
    return (replace(problem, batch=1, keys=LONGEST_CACHE) if long else problem).arrays()


def repeats(array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """How often an array of `random_arrays`, or its scales, has to be repeated along each axis."""
    return tuple(whole // part for whole, part in zip(shape, array.shape))


@functools.lru_cache(maxsize=KEPT)
def on_device(problem: Problem) -> list[Any]:
    """Query, key, value and the weights of the output; quantized keys and values are pairs with their scales."""
    arrays: list[Any] = [jnp.asarray(array).astype(problem.dtype) for array in random_arrays(problem)]
    if problem.key_dtype is not None:
        arrays[1:3] = [mqa_jax.quantize(x, problem.key_dtype) for x in arrays[1:3]]
    whole = lambda shape, tree: jax.tree.map(lambda x: jnp.tile(x, repeats(x, shape)), tree)
    return [whole(shape, tree) for shape, tree in zip(problem.shapes(), arrays)]


def plain_arrays(problem: Problem, dtype: Any) -> list[Array]:
    """The same in another dtype, quantized keys and values as what they stand for."""
    plain = lambda x: mqa_jax.dequantize(*x) if isinstance(x, tuple) else x
    return [plain(x).astype(dtype) for x in on_device(without_gradients(problem))]


# -- peers in JAX: from a problem, query, key and value to the output --------------------------------------------------


INTERPRETED = flash.Kernels(
    functools.partial(triton.forward, interpret=True), functools.partial(triton.backward, interpret=True)
)


def ours(problem: Problem, query: Array, key: Any, value: Any, is_causal: bool, implementation: str) -> Array:
    options = problem.options()
    if isinstance(key, tuple):
        (key, options["key_scale"]), (value, options["value_scale"]) = key, value
    if implementation == "triton" and jax.default_backend() != "gpu":
        inputs = checked_inputs(query, key, value, None, None, Options(**options))
        return flash.attend(INTERPRETED, inputs)[0]
    return mqa_jax.dot_product_attention(query, key, value, **options, implementation=implementation)


def jax_nn(
    problem: Problem, query: Array, key: Array, value: Array, is_causal: bool, implementation: Literal["xla", "cudnn"]
) -> Array:
    problem.needs_no("dropout", "key_dtype")
    bias, mask = bias_and_mask(problem)
    if implementation == "cudnn" and bias is not None:
        raise NotApplicable("it has no ALiBi; it would take a bias, in bfloat16, which is too coarse for distances")
    if implementation == "xla":
        has_space_for_scores(problem)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        local_window_size=None if problem.is_step else problem.sides(),
        implementation=implementation,
    )


def tokamax(problem: Problem, query: Array, key: Array, value: Array, is_causal: bool) -> Array:
    attend = importlib.import_module("tokamax").dot_product_attention
    problem.needs_no("dropout", "key_dtype")
    bias, mask = bias_and_mask(problem)
    sides = None if problem.is_step else problem.sides()
    return attend(query, key, value, bias, mask, is_causal=is_causal, local_window_size=sides)


def pallas_mha(problem: Problem, query: Array, key: Array, value: Array, is_causal: bool) -> Array:
    """JAX's own example. It wants as many key/value heads as query heads, and whole blocks of queries and keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is for tokamax
        mha = importlib.import_module("jax.experimental.pallas.ops.gpu.attention").mha
    problem.needs_no("window", "alibi", "dropout", "key_dtype")
    if problem.is_step:
        raise NotApplicable("it wants as many queries as keys")
    group = problem.heads // problem.kv_heads
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    padding = -problem.queries % 128
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
    ids = None
    if problem.documents > 1 or (padding and not is_causal):  # a causal mask hides the padding, which comes last
        ids = jnp.pad(problem.ids(), ((0, 0), (0, padding)), constant_values=problem.documents)
    interpret = jax.default_backend() != "gpu"
    out = mha(query, key, value, ids, sm_scale=problem.head_dim**-0.5, causal=is_causal, interpret=interpret)
    return out[:, : problem.queries]


def bias_and_mask(problem: Problem) -> tuple[Array | None, Array | None]:
    """ALiBi, documents, and the window of a single query, for those who know none of them."""
    bias = mask = None
    tokens = positions(problem.queries)
    if problem.alibi:
        distance = jnp.abs(tokens[:, None] - tokens[None]).astype(jnp.float32)
        bias = (-mqa_jax.alibi_slopes(problem.heads)[:, None, None] * distance)[None]
    if problem.documents > 1:
        ids = problem.ids()[:1, None]
        mask = ids[..., :, None] == ids[..., None, :]
    if problem.is_step and problem.window is not None:
        mask = (positions(problem.keys) >= problem.keys - problem.window)[None, None, None]
    return bias, mask


def has_space_for_scores(problem: Problem) -> None:
    size = 4 * problem.batch * problem.heads * problem.queries * problem.keys
    if size > LARGEST_SCORES:
        raise NotApplicable(f"one array of all scores would be {size / 2**30:.0f} GiB")


JAX_PEERS: dict[str, Callable[..., Array]] = {
    "ours": functools.partial(ours, implementation="triton"),
    "ours, xla": functools.partial(ours, implementation="xla"),
    "jax.nn, cudnn": functools.partial(jax_nn, implementation="cudnn"),
    "jax.nn, xla": functools.partial(jax_nn, implementation="xla"),
    "pallas mha": pallas_mha,
    "tokamax": tokamax,
}


def precision_of(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """JAX may multiply float32 as tf32 on a GPU, which is another problem."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


@functools.cache
def compiled(peer: str, problem: Problem) -> Callable[..., Any]:
    """The program of a JAX peer."""
    shapes: list[Any] = [jax.ShapeDtypeStruct(shape, problem.dtype) for shape in problem.shapes()]
    if problem.key_dtype is not None:
        shapes[1:3] = [
            (jax.ShapeDtypeStruct(x.shape, problem.key_dtype), jax.ShapeDtypeStruct(x.shape[:-1], "float32"))
            for x in shapes[1:3]
        ]
    with precision_of(problem.dtype):
        return jax_program(functools.partial(JAX_PEERS[peer], problem), problem).lower(*shapes).compile()


def jax_peer(peer: str, problem: Problem) -> Candidate:
    """Costs seconds a call."""
    program, arrays = compiled(peer, problem), on_device(without_gradients(problem))
    run = lambda: program(*arrays)
    cost = functools.partial(timing.seconds_per_call, run, finish=jax.block_until_ready)
    return Candidate(lambda: [np.asarray(x.astype(jnp.float32)) for x in run()], cost)


# -- peers in PyTorch --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=KEPT)
def torch_tensors(problem: Problem, device: str) -> list[Any]:
    """On PyTorch's own layout `[B, N, T, H]`."""
    import torch

    move = lambda array: torch.from_numpy(array).to(device, getattr(torch, problem.dtype)).transpose(1, 2).contiguous()
    arrays = zip(random_arrays(problem), problem.shapes())
    repeated = [(move(array), repeats(array, shape)) for array, shape in arrays]
    return [tensor.repeat(batch, heads, length, 1) for tensor, (batch, length, heads, _) in repeated]


def torch_peer(backend: str, problem: Problem) -> Candidate:
    """Costs seconds a call of PyTorch's SDPA."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    problem.needs_no("window", "alibi", "documents", "key_dtype")
    if problem.dropout:
        raise NotApplicable("it drops other weights, so its numbers cannot be checked")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and jax.default_backend() == "gpu":
        raise NotApplicable("this PyTorch has no CUDA")
    query, key, value, weights = torch_tensors(without_gradients(problem), device)
    attend: Any = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=problem.is_causal,
        enable_gqa=problem.heads != problem.kv_heads,
    )

    def run() -> tuple[Any, ...]:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch_results(attend, problem.gradients, query, key, value, weights)

    finish = lambda result: torch.cuda.synchronize() if device == "cuda" else None
    cost = functools.partial(timing.seconds_per_call, run, finish=finish)
    return Candidate(lambda: [tensor.transpose(1, 2).float().cpu().numpy() for tensor in run()], cost)


def peers_of(problem: Problem) -> Peers:
    """PyTorch's kernel for float32 is another one."""
    backends = ["EFFICIENT"] if problem.dtype == "float32" else ["FLASH", "CUDNN"]
    return {name: functools.partial(jax_peer, name) for name in JAX_PEERS} | {
        f"torch, {backend.lower()}": functools.partial(torch_peer, f"{backend}_ATTENTION") for backend in backends
    }


# -- the rule ----------------------------------------------------------------------------------------------------------


def exact(problem: Problem) -> list[np.ndarray]:
    """The outputs in float32, for the numbers that the peers get."""
    return _exact(replace(problem, gradients=True))[: problem.results]


def allowed(peer: str, problem: Problem) -> list[float]:
    """By how much outputs may differ from `exact`: the oracle's rule, with the largest error of a plain computation.

    Others follow rules of their own, as FlashAttention, which allows its gradients half as much again: they are given
    LENIENCE times as much, which no wrong mask or head gets by with. Dropout changes hardly anything about all that,
    and the plain computation has none.
    """
    errors = _allowed(replace(problem, gradients=True, dropout=0.0))[: problem.results]
    return errors if peer.startswith("ours") else [LENIENCE * error for error in errors]


@functools.lru_cache(maxsize=KEPT)
def _exact(problem: Problem) -> list[np.ndarray]:
    attend = functools.partial(ours, problem, implementation="reference")
    return [np.asarray(x) for x in jax_program(attend, problem)(*plain_arrays(problem, jnp.float32))]


@functools.lru_cache(maxsize=KEPT)
def _allowed(problem: Problem) -> list[float]:
    with precision_of(problem.dtype):
        program = jax_program(functools.partial(plain_attention, problem), problem)
        plain = program(*plain_arrays(problem, problem.dtype))
    unit = oracle.FLOOR_ULPS[problem.dtype] * float(jnp.finfo(problem.dtype).eps)
    largest = lambda array: float(np.max(np.abs(array)))
    return [
        oracle.FACTOR * largest(np.asarray(x.astype(jnp.float32)) - right) + unit * largest(right)
        for x, right in zip(plain, _exact(problem), strict=True)
    ]


def plain_attention(problem: Problem, query: Array, key: Array, value: Array, is_causal: bool) -> Array:
    """The oracle's, which knows masks and ALiBi as a bias: the scores of a query that is 0."""
    inputs = checked_inputs(jnp.zeros_like(query), key, value, None, None, Options(**problem.options()))
    bias = jax.lax.stop_gradient(reference.scores(inputs))
    out, _ = oracle.plain_attention({"query": query, "key": key, "value": value, "bias": bias}, {})
    return out
