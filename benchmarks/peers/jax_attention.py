"""Attention in JAX, by us and by others: each a function of a problem, query, key and value.

A peer says itself what it does not do, by raising `NotApplicable` when it is traced. Its program is compiled once for
each problem, and may be compiled in any thread. Others are imported where they are used: they may be absent.
"""

import contextlib
import functools
import importlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import mqa_jax
from benchmarks import timing
from benchmarks.candidate import Candidate, NotApplicable
from benchmarks.problems import Problem
from mqa_jax.attention import inputs_of
from mqa_jax.kernels import flash, gpu, platforms
from mqa_jax.kernels.triton import implementation as triton

Attend = Callable[..., Array]  # problem, query, key, value

MAX_SCORE_BYTES = 10 << 30  # bytes of one array of all scores; gradients take four of them
MAX_CACHE = 16384  # the numbers of a longer one repeat, in each row: making them all would take minutes
KEPT = 3  # problems: what is measured, what is checked, and that without dropout


# -- numbers -----------------------------------------------------------------------------------------------------------


def without_gradients(problem: Problem) -> Problem:
    """The numbers of a problem are the same for both."""
    return replace(problem, gradients=False)


@functools.lru_cache(maxsize=KEPT)
def random_arrays(problem: Problem) -> list[np.ndarray]:
    long = problem.continues and problem.keys > MAX_CACHE
    return (replace(problem, batch=1, keys=MAX_CACHE) if long else problem).arrays()


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


def structs(problem: Problem) -> list[Any]:
    """The shapes and dtypes of `on_device`."""
    shapes: list[Any] = [jax.ShapeDtypeStruct(shape, problem.dtype) for shape in problem.shapes()]
    if problem.key_dtype is not None:
        shapes[1:3] = [
            (jax.ShapeDtypeStruct(x.shape, problem.key_dtype), jax.ShapeDtypeStruct(x.shape[:-1], "float32"))
            for x in shapes[1:3]
        ]
    return shapes


# -- peers -------------------------------------------------------------------------------------------------------------


def for_gpu() -> bool:
    """Whether what is traced now runs on a GPU, or is compiled for one."""
    return jax.default_backend() == "gpu" or gpu.is_assumed()


INTERPRETED = platforms.Kernels(
    functools.partial(triton.forward, interpret=True), functools.partial(triton.backward, interpret=True)
)


def ours(problem: Problem, query: Array, key: Any, value: Any, implementation: str | None = None) -> Array:
    options = problem.options()
    if isinstance(key, tuple):
        (key, options["key_scale"]), (value, options["value_scale"]) = key, value
    if implementation == "triton" and not for_gpu():
        inputs = inputs_of(query, key, value, **options)
        return flash.attend(INTERPRETED, inputs)[0]
    return mqa_jax.dot_product_attention(query, key, value, **options, implementation=implementation)


def jax_nn(
    problem: Problem, query: Array, key: Array, value: Array, implementation: Literal["xla", "cudnn"] = "xla"
) -> Array:
    if implementation == "cudnn" and problem.alibi:
        raise NotApplicable("it has no ALiBi; it would take a bias, in bfloat16, which is too coarse for distances")
    return in_words_of_jax_nn(jax.nn.dot_product_attention, problem, query, key, value, implementation)


def flax_linen(problem: Problem, query: Array, key: Array, value: Array) -> Array:
    """What is inside Flax's linen module. It wants as many key/value heads as query heads, and everything as a mask."""
    problem.needs_no("dropout", "key_dtype")
    key, value = (jnp.repeat(x, problem.heads // problem.kv_heads, axis=2) for x in (key, value))
    return nn.dot_product_attention(query, key, value, problem.bias(), problem.mask())


def tokamax(problem: Problem, query: Array, key: Array, value: Array, implementation: str) -> Array:
    attend = importlib.import_module("tokamax").dot_product_attention
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()  # or it would take this command's options for its own
    return in_words_of_jax_nn(attend, problem, query, key, value, implementation)


def in_words_of_jax_nn(
    attend: Attend, problem: Problem, query: Array, key: Array, value: Array, implementation: str
) -> Array:
    """Causal masks and windows go by their names where positions count from 0; the rest is masks and biases."""
    problem.needs_no("dropout", "key_dtype")
    named: dict[str, Any] = {}
    if not problem.continues:
        named = dict(is_causal=problem.is_causal, local_window_size=problem.sides())
        problem = replace(problem, is_causal=False, window=None)
    return attend(query, key, value, problem.bias(), problem.mask(), **named, implementation=implementation)


def pallas_module(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # they are for tokamax
        return importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}")


def pallas_mha(problem: Problem, query: Array, key: Array, value: Array) -> Array:
    """JAX's own example. It wants as many key/value heads as query heads, and whole blocks of queries and keys."""
    mha = pallas_module("attention").mha
    problem.needs_no("window", "alibi", "dropout", "key_dtype")
    if problem.continues:
        raise NotApplicable("it wants as many queries as keys")
    group = problem.heads // problem.kv_heads
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    padding = -problem.queries % 128
    query, key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (query, key, value))
    ids = None
    if problem.documents > 1 or (padding and not problem.is_causal):  # else the mask hides the padding, which is last
        ids = jnp.pad(problem.ids(), ((0, 0), (0, padding)), constant_values=problem.documents)
    out = mha(
        query,
        key,
        value,
        ids,
        sm_scale=problem.head_dim**-0.5,
        causal=problem.is_causal,
        interpret=not for_gpu(),
    )
    return out[:, : problem.queries]


def pallas_decode(problem: Problem, query: Array, key: Array, value: Array) -> Array:
    """JAX's own example of a step. A window is where its keys start. It wants 16 parts of whole blocks of 128 keys."""
    attend = pallas_module("decode_attention").gqa
    problem.needs_no("alibi", "dropout", "key_dtype", "gradients")
    if problem.queries > 1:
        raise NotApplicable("it takes one query")
    start = None if problem.window is None else jnp.int32(max(0, problem.keys - problem.window))
    padding = -problem.keys % (16 * 128)
    key, value = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (key, value))
    end = jnp.int32(problem.keys) if padding else None
    out = attend(query[:, 0], key, value, start_idx=start, kv_seq_len=end, interpret=not for_gpu())
    return out[:, None]


PEERS: dict[str, Attend] = {
    "ours": ours,
    "ours, triton": functools.partial(ours, implementation="triton"),
    "ours, xla": functools.partial(ours, implementation="xla"),
    "jax.nn": jax_nn,
    "jax.nn cudnn": functools.partial(jax_nn, implementation="cudnn"),
    "flax.linen": flax_linen,
    "pallas mha": pallas_mha,
    "pallas decode": pallas_decode,
    "tokamax triton": functools.partial(tokamax, implementation="triton"),
    "tokamax mosaic": functools.partial(tokamax, implementation="mosaic"),
    "tokamax chunked": functools.partial(tokamax, implementation="xla_chunked"),
}
PLAIN = ("jax.nn", "flax.linen")  # those that have an array of all scores
ON_GPU = ("jax.nn cudnn", "pallas mha", "pallas decode", "tokamax triton", "tokamax mosaic")  # alone


# -- programs ----------------------------------------------------------------------------------------------------------


def program_of(attend: Attend, problem: Problem) -> Callable[..., tuple[Array, ...]]:
    """The output, and the gradients if the problem wants them."""

    def program(query: Any, key: Any, value: Any, weights: Array) -> tuple[Array, ...]:
        attention = functools.partial(attend, problem)
        if not problem.gradients:
            return (attention(query, key, value),)
        out, pull_back = jax.vjp(attention, query, key, value)
        return out, *pull_back(weights)

    return program


def precision_of(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """JAX may multiply float32 as tf32 on a GPU, which is another problem."""
    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


class Compiled(NamedTuple):
    """A program, and what `Candidate` says of it."""

    run: Callable[..., Any]
    seconds: float
    temporaries: int | None


def compile_timed(function: Callable[..., Any], *arguments: Any) -> Compiled:
    lowered = jax.jit(function).lower(*arguments)
    start = time.perf_counter()
    run = lowered.compile()
    seconds = time.perf_counter() - start
    memory = run.memory_analysis()
    return Compiled(run, seconds, memory and memory.temp_size_in_bytes)


@functools.cache
def compiled(peer: str, problem: Problem) -> Compiled:
    """The program of a peer."""
    with precision_of(problem.dtype):
        return compile_timed(program_of(PEERS[peer], problem), *structs(problem))


def runnable(peer: str, problem: Problem) -> Compiled:
    """The program of a peer, if there is space to run it."""
    if peer in PLAIN and problem.score_bytes > MAX_SCORE_BYTES:
        raise NotApplicable(f"one array of all scores would be {problem.score_bytes / 2**30:.0f} GiB")
    return compiled(peer, problem)


def timed(peer: str, problem: Problem) -> Candidate:
    """Costs seconds a call."""
    return candidate_of(runnable(peer, problem), on_device(without_gradients(problem)))


def candidate_of(program: Compiled, arguments: Any) -> Candidate:
    """Costs seconds a call: on a GPU of calls that queue up, on a CPU of calls that wait for each other."""
    call = lambda: program.run(*arguments)
    queued = jax.default_backend() == "gpu"
    run = call if queued else lambda: jax.block_until_ready(call())
    cost = functools.partial(timing.seconds_per_call, run, finish=jax.block_until_ready)
    outputs = lambda: [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(run())]
    return Candidate(outputs, cost, program.seconds, program.temporaries)


def measured_by_memory(peer: str, problem: Problem) -> Candidate:
    """Costs bytes of temporaries. The problem is compiled for it; only if outputs are asked for it is run."""
    program = compiled(peer, problem)
    if program.temporaries is None:
        raise NotApplicable("this device's compiler does not say what memory a program takes")
    outputs = lambda: candidate_of(program, on_device(without_gradients(problem))).outputs()
    return Candidate(outputs, lambda least: float(program.temporaries or 0), program.seconds, program.temporaries)


def not_on_cpu(problem: Problem) -> Candidate:
    raise NotApplicable("it runs on GPUs only")


def names_for(problem: Problem, device: str) -> tuple[str, ...]:
    """Those that are asked, on "cpu" or "gpu"; there "ours" is the kernels, and the plain one has a name."""
    pallas = "pallas decode" if problem.queries == 1 else "pallas mha"
    others = ("jax.nn", "jax.nn cudnn", pallas, "tokamax triton", "tokamax mosaic", "tokamax chunked")
    return ("ours", *others) if device == "cpu" else ("ours", "ours, xla", *others)


def program_name(name: str, device: str) -> str:
    """In PEERS."""
    return "ours, triton" if name == "ours" and device == "gpu" else name


def peers_for(problem: Problem, device: str) -> Mapping[str, Callable[[Problem], Candidate]]:
    return {
        name: not_on_cpu if device == "cpu" and name in ON_GPU else functools.partial(timed, program_name(name, device))
        for name in names_for(problem, device)
    }
