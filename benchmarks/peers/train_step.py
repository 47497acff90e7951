"""A whole step of training a small language model, with our attention layer and with Flax's: the same weights."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import mqa_jax
from benchmarks import judge
from benchmarks.candidate import Candidate
from benchmarks.peers.jax_attention import KEPT, candidate_of, compile_timed, precision_of

LEARNING_RATE = 1.0  # such that parameters move by their whole gradients, and what is compared is these


@dataclass(frozen=True)
class TrainStep:
    """Loss, gradients and new parameters of a model, for a batch of texts."""

    batch: int
    length: int
    dim: int
    heads: int
    layers: int
    vocabulary: int = 256
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = f"B={self.batch} T={self.length} D={self.dim} N={self.heads} layers={self.layers}"
        return f"{sizes} {self.dtype}"

    def small(self) -> "TrainStep":
        return replace(self, batch=1, length=16, dim=16, heads=2, layers=1)

    @property
    def flops(self) -> float:
        """Forward: 24 * D**2 a token and layer for products with weights, 2 * T * D for causal attention.

        2 * D * vocabulary a token for the logits. Backward twice as much, and 2.5 times for attention.
        """
        tokens = self.batch * self.length
        products = 24 * self.dim**2 * self.layers + 2 * self.dim * self.vocabulary
        return tokens * (3 * products + 3.5 * 2 * self.length * self.dim * self.layers)

    @property
    def bytes(self) -> float:
        """Parameters: read in the forward and the backward pass and in the update, gradients and they are written."""
        parameters = 12 * self.dim**2 * self.layers + self.dim * self.vocabulary
        return 5 * parameters * jnp.dtype(self.dtype).itemsize


def ours(step: TrainStep, x: Array, name: str, implementation: str | None = None) -> Array:
    layer = mqa_jax.MultiHeadAttention(step.dim, step.heads, attn_impl=implementation, dtype=step.dtype, name=name)
    return layer(x)[0]


def flax_linen(step: TrainStep, x: Array, name: str, **options: Any) -> Array:
    layer = nn.MultiHeadDotProductAttention(step.heads, dtype=step.dtype, name=name, **options)
    return layer(x, mask=nn.make_causal_mask(x[..., 0], dtype=bool))


def jax_nn(query: Array, key: Array, value: Array, mask: Array | None = None, **options: Any) -> Array:
    """As Flax's `attention_fn`; what else it passes is about dropout and dtypes, which are the same."""
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


class Model(nn.Module):
    """Blocks with norms before, and tied embeddings. Attributes: attend, an attention layer's output, by its name."""

    step: TrainStep
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T vocabulary"]:
        step = self.step
        dense = functools.partial(nn.Dense, dtype=step.dtype)
        norm = functools.partial(nn.RMSNorm, dtype=step.dtype)
        embed = nn.Embed(step.vocabulary, step.dim, dtype=step.dtype)
        x = embed(tokens)
        for number in range(step.layers):
            x = x + self.attend(step, norm()(x), name=f"attention_{number}")
            x = x + dense(step.dim)(nn.gelu(dense(4 * step.dim)(norm()(x))))
        return embed.attend(norm()(x)).astype(jnp.float32)


def program_of(attend: Callable[..., Array], step: TrainStep) -> Callable[..., Any]:
    """Loss, in nats a token, and the parameters after a step down the gradients."""
    model = Model(step, attend)

    def loss(params: Any, texts: Int[Array, "B T_plus_1"]) -> Float[Array, ""]:
        logits: Any = model.apply({"params": params}, texts[:, :-1])
        scores = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(scores, texts[:, 1:, None], axis=-1).mean()

    def program(params: Any, texts: Int[Array, "B T_plus_1"]) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, texts)
        return value, jax.tree.map(lambda x, dx: x - LEARNING_RATE * dx, params, gradients)

    return program


@functools.lru_cache(maxsize=KEPT)
def on_device(step: TrainStep) -> Any:
    """Parameters, float32 as in mixed-precision training, and texts."""
    texts = jax.random.randint(jax.random.key(1), (step.batch, step.length + 1), 0, step.vocabulary)
    return Model(step, ours).init(jax.random.key(0), texts[:1, :1])["params"], texts


def timed(attend: Callable[..., Array], step: TrainStep) -> Candidate:
    """Costs seconds a step."""
    with precision_of(step.dtype):
        return candidate_of(compile_timed(program_of(attend, step), *on_device(step)), on_device(step))


@functools.lru_cache(maxsize=KEPT)
def outputs_of(attend: Callable[..., Array], step: TrainStep) -> list[np.ndarray]:
    with precision_of("float32"):
        outputs = jax.jit(program_of(attend, step))(*on_device(replace(step, dtype="float32")))
    return [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(outputs)]


TEXTBOOK = functools.partial(ours, implementation="reference")


def exact(step: TrainStep) -> list[np.ndarray]:
    """In float32, with our attention as written in a textbook."""
    return outputs_of(TEXTBOOK, replace(step, dtype="float32"))


def allowed(peer: str, step: TrainStep) -> list[float]:
    """The rule of `judge`, with Flax's linen module as the plain computation."""
    return judge.lenient(peer, judge.bounds_of_sums(outputs_of(flax_linen, step), exact(step), step.dtype))


PEERS = {
    "ours": functools.partial(timed, ours),
    "flax.linen": functools.partial(timed, flax_linen),
    "flax.linen with jax.nn": functools.partial(timed, functools.partial(flax_linen, attention_fn=jax_nn)),
}
