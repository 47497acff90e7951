"""Whole attention layers, with their projections: our module against Flax's, with the same weights.

Flax's linen module knows no grouped heads, so these are multi-head layers.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

import mqa_jax
from benchmarks import judge
from benchmarks.candidate import Candidate
from benchmarks.peers.jax_attention import KEPT, candidate_of, compile_timed, precision_of

STEPS = 16  # of decoding in one call: in the first the cache is copied, as it is not donated
Params = dict[str, dict[str, Any]]
Cache = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One call of a causal layer.

    Attributes:
      decode: whether the last STEPS tokens come one by one, after others that are cached.
      gradients: whether those of sum(weights * output) for parameters and input are computed too.
    """

    batch: int
    length: int
    dim: int
    heads: int
    decode: bool = False
    gradients: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        kind = f"{STEPS} tokens one by one after {self.cached}" if self.decode else f"T={self.length} causal"
        return f"B={self.batch} {kind} D={self.dim} N={self.heads} {self.dtype}"

    def small(self) -> "Layer":
        return replace(self, batch=1, length=2 * STEPS, dim=16, heads=2)

    @property
    def queries(self) -> int:
        return STEPS if self.decode else self.length

    @property
    def cached(self) -> int:
        return self.length - self.queries

    @property
    def flops(self) -> float:
        """Four projections, 8 * B * T * D**2, and attention, 4 * B * pairs * D; with gradients 3 and 3.5 times that."""
        pairs = self.queries * (self.cached + self.queries / 2)
        projections, attention = 8 * self.batch * self.queries * self.dim**2, 4 * self.batch * pairs * self.dim
        return 3 * projections + 3.5 * attention if self.gradients else projections + attention

    @property
    def bytes(self) -> float:
        """Weights and what is cached, once for each call of the module; input and output. With gradients thrice."""
        each = 4 * self.dim**2 + (2 * self.batch * self.cached * self.dim if self.decode else 0)
        numbers = each * (STEPS if self.decode else 1) + 2 * self.batch * self.queries * self.dim
        return (3 if self.gradients else 1) * numbers * jnp.dtype(self.dtype).itemsize

    def arrays(self) -> tuple[Params, Float[np.ndarray, "B T D"], Float[np.ndarray, "B T D"], Cache]:
        """Parameters, input, weights of the output and cache."""
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, dtype=np.float32)

        split = (self.heads, self.dim // self.heads)
        params = {
            name: {"kernel": normal(self.dim, *split), "bias": normal(*split)} for name in ("query", "key", "value")
        }
        params["out"] = {"kernel": normal(*split, self.dim), "bias": normal(self.dim)}
        params = jax.tree.map(lambda x: x / np.float32(self.dim**0.5), params)
        x, weights = (normal(self.batch, self.queries, self.dim) for _ in range(2))
        cache: Cache = {}
        if self.decode:
            cached = {name: normal(self.batch, self.length, *split) for name in ("cached_key", "cached_value")}
            cache = {**cached, "cache_index": np.int32(self.cached)}
        return params, x, weights, cache


# A peer computes the output for x, and, where it was given a cache, what that is afterwards.
Attend = Callable[..., tuple[Array, Cache]]


def ours(
    layer: Layer, params: Params, x: Array, cache: Cache, implementation: str | None = None
) -> tuple[Array, Cache]:
    module = mqa_jax.MultiHeadAttention(layer.dim, layer.heads, attn_impl=implementation, dtype=layer.dtype)
    if not layer.decode:
        return module.apply({"params": params}, x)[0], cache
    rows = {**cache, "cache_index": jnp.broadcast_to(cache["cache_index"], (layer.batch,))}  # each has its own
    (out, _, _), changed = module.apply({"params": params, "cache": rows}, x, mutable=["cache"])
    return out, {**changed["cache"], "cache_index": changed["cache"]["cache_index"][0]}


def flax_linen(layer: Layer, params: Params, x: Array, cache: Cache) -> tuple[Array, Cache]:
    module = nn.MultiHeadDotProductAttention(layer.heads, dtype=layer.dtype, decode=layer.decode)
    out: Any
    if not layer.decode:
        out = module.apply({"params": params}, x, mask=nn.make_causal_mask(x[..., 0], dtype=bool))
        return out, cache
    out, changed = module.apply({"params": params, "cache": cache}, x, mutable=["cache"])
    return out, changed["cache"]


def flax_nnx(layer: Layer, params: Params, x: Array, cache: Cache) -> tuple[Array, Cache]:
    build = lambda: nnx.MultiHeadAttention(
        layer.heads, layer.dim, dtype=jnp.dtype(layer.dtype), decode=layer.decode, keep_rngs=False, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(nnx.eval_shape(build))
    nnx.replace_by_pure_dict(state, params)
    module = nnx.merge(graph, state)
    if not layer.decode:
        return module(x, is_causal=True), cache
    for name, array in cache.items():
        setattr(module, name, nnx.Cache(array))
    out = module(x)
    return out, {name: getattr(module, name)[...] for name in cache}


def program_of(attend: Attend, layer: Layer) -> Callable[..., Any]:
    """The output, and the gradients if the layer wants them."""

    def program(params: Params, x: Array, weights: Array, cache: Cache) -> Any:
        if layer.decode:
            step = lambda cache, token: attend(layer, params, token[:, None], cache)[::-1]
            return jax.lax.scan(step, cache, x.swapaxes(0, 1))[1]
        apply = lambda params, x: attend(layer, params, x, cache)[0]
        if not layer.gradients:
            return apply(params, x)
        out, pull_back = jax.vjp(apply, params, x)
        return out, *pull_back(weights)

    return program


@functools.lru_cache(maxsize=KEPT)
def on_device(layer: Layer) -> Any:
    cast = lambda x: jnp.asarray(x, layer.dtype if x.dtype == np.float32 else None)
    return jax.tree.map(cast, layer.arrays())


def timed(attend: Attend, layer: Layer) -> Candidate:
    """Costs seconds a call."""
    arrays = on_device(replace(layer, gradients=False))
    with precision_of(layer.dtype):
        return candidate_of(compile_timed(program_of(attend, layer), *arrays), arrays)


@functools.lru_cache(maxsize=KEPT)
def outputs_of(attend: Attend, layer: Layer, dtype: str) -> list[np.ndarray]:
    """Computed in a dtype from the numbers that a layer of another has."""
    cast = lambda x: x if x.dtype == jnp.int32 else x.astype(dtype)
    arrays = jax.tree.map(cast, on_device(replace(layer, gradients=False)))
    with precision_of("float32"):
        outputs = jax.jit(program_of(attend, replace(layer, dtype=dtype)))(*arrays)
    return [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(outputs)]


TEXTBOOK = functools.partial(ours, implementation="reference")


def exact(layer: Layer) -> list[np.ndarray]:
    """In float32, by ours as written in a textbook."""
    return outputs_of(TEXTBOOK, layer, "float32")


def allowed(peer: str, layer: Layer) -> list[float]:
    """The rule of `judge`, with Flax's linen module as the plain computation."""
    plain = outputs_of(flax_linen, layer, layer.dtype)
    return judge.lenient(peer, judge.bounds_of_sums(plain, exact(layer), layer.dtype))


PEERS = {
    "ours": functools.partial(timed, ours),
    "flax.linen": functools.partial(timed, flax_linen),
    "flax.nnx": functools.partial(timed, flax_nnx),
}
