"""The effects of a smaller cache on a trained language model: perplexity, greedy text, and the error of each layer.

    python examples/cache_formats.py
    python examples/cache_formats.py --plot cache_formats.png --model path/to/folder-or-file.gguf

The same model runs with its keys and values cached in float32, bfloat16, int8 and float8_e4m3fn.

The perplexity is that of a passage of Python's manual, `pydoc_data.topics`, processed with the cache: first in chunks,
then token by token, so that every query attends to keys and values as they are stored.

The error of a layer excludes the errors of other layers: its inputs are those of the float32 run. It compares the
outputs of the attention module with this cache and with the float32 cache, over all tokens of the passage: the largest
difference over the largest output, and the root mean square of the difference over that of the output.
"""

import argparse
import functools
import platform
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from cache_report import LayerError, Result, error_table, save_plot, side_by_side, table
from checkpoints import load_checkpoint
from command_line import Parser, exit_with_a_sentence
from generate import CACHE_DTYPES, Linen, Params, Sampling, check_prompt, check_tokens, decode, prefill
from jax import lax
from jaxtyping import Array, Float, Int
from llama import Block, Llama, LlamaConfig, cache_bytes_per_token
from matplotlib.backend_bases import FigureCanvasBase
from tokens import Text, load_text
from tqdm import tqdm

import mqa_jax

TOPIC = "execmodel"  # prose rather than code
CHUNK = 200  # tokens that are processed at once
PROMPT, QUESTION = "The capital of France is", "Why is the sky blue?"
NEW_TOKENS = 40


# -- reading ----------------------------------------------------------------------------------------------------------


class LayerRun(NamedTuple):
    """The inputs of one layer and the outputs of its attention."""

    inputs: Float[Array, "1 T D"]
    attended: Float[Array, "1 T D"]


class Reading(NamedTuple):
    perplexity: float
    layers: list[LayerRun]


def read(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, " T_plus_1"]) -> Reading:
    """Predicts every token but the first, with the cache.

    Each layer processes the whole text before the next one starts. The results are the same as token by token, because
    a layer depends only on the outputs of the layer before for the same and earlier tokens. So all layers use the same
    small program, which compiles quickly.
    """
    x = params["embed"]["embedding"][tokens[None, :-1]]
    layers = []
    for i in tqdm(range(config.layers), desc="reading", unit="layer", leave=False):
        attended, output = read_layer(config, params[f"layer_{i}"], x)
        layers.append(LayerRun(x, attended))
        x = output
    return Reading(float(perplexity(config, params, x, jnp.asarray(tokens[None, 1:]))), layers)


@functools.partial(jax.jit, static_argnames="config")
def read_layer(
    config: LlamaConfig, params: Params, x: Float[Array, "1 T D"]
) -> tuple[Float[Array, "1 T D"], Float[Array, "1 T D"]]:
    """The outputs of one layer's attention and of the layer for a text: first chunks, then 1 to CHUNK single tokens."""
    block = Block(config, deterministic=True)
    is_attention = lambda module, method: isinstance(module, mqa_jax.GroupedQueryAttention) and method == "__call__"

    def read_piece(cache: Any, piece: Float[Array, "1 _ D"]) -> tuple[Any, tuple[Array, Array]]:
        output, changed = block.apply(
            {"params": params, "cache": cache},
            piece,
            None,
            mutable=["cache", "intermediates"],
            capture_intermediates=is_attention,
        )
        ((attended, _, _),) = changed["intermediates"]["attention"]["__call__"]
        return changed["cache"], (attended, output)

    count, dim = x.shape[1:]
    chunks = (count - 1) // CHUNK
    cache, outputs = mqa_jax.init_cache(block, 1, count, x, None), []
    for part, width in ((x[0, : chunks * CHUNK], CHUNK), (x[0, chunks * CHUNK :], 1)):
        cache, pieces = lax.scan(read_piece, cache, part.reshape(len(part) // width, 1, width, dim))
        outputs.append(jax.tree.map(lambda x: x.reshape(1, -1, dim), pieces))
    attended, output = (jnp.concatenate(parts, axis=1) for parts in zip(*outputs))
    return attended, output


@functools.partial(jax.jit, static_argnames="config")
def perplexity(
    config: LlamaConfig, params: Params, x: Float[Array, "1 T D"], targets: Int[Array, "1 T"]
) -> Float[Array, ""]:
    """The perplexity of the targets, given the outputs of the last layer for the tokens before each."""
    normed = nn.RMSNorm(epsilon=config.norm_eps).apply({"params": params["norm"]}, x)
    kernel = params["embed"]["embedding"].T if config.tied_embeddings else params["lm_head"]["kernel"]
    probable = jax.nn.log_softmax(normed @ kernel)
    return jnp.exp(-jnp.take_along_axis(probable, targets[..., None], axis=-1).mean())


def layer_errors(config: LlamaConfig, params: Params, layers: list[LayerRun]) -> list[LayerError]:
    """The error of each layer by itself, with the cache of `config`; `layers` are those of the float32 run."""
    errors = []
    for i, layer in enumerate(tqdm(layers, desc="errors", unit="layer", leave=False)):
        attended, _ = read_layer(config, params[f"layer_{i}"], layer.inputs)
        errors.append(layer_error(attended, layer.attended))
    return errors


def layer_error(actual: Float[Array, "1 T D"], expected: Float[Array, "1 T D"]) -> LayerError:
    difference, norm = actual - expected, jnp.linalg.norm
    return LayerError(
        float(jnp.abs(difference).max() / jnp.abs(expected).max()), float(norm(difference) / norm(expected))
    )


# -- writing ----------------------------------------------------------------------------------------------------------


def write(config: LlamaConfig, params: Params, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Generates tokens after each prompt with the programs of `generate.py`; the prompts are rows of one batch."""
    api, key = Linen(Llama(config)), jax.random.key(0)
    lengths = jnp.array([len(prompt) for prompt in prompts])
    padded = jnp.array([prompt + [0] * (max(lengths.tolist()) - len(prompt)) for prompt in prompts])
    cache = mqa_jax.init_cache(api.model, len(prompts), padded.shape[1] + sampling.max_tokens, padded)
    first, cache = prefill(api, sampling, params, cache, padded, lengths, key)
    rows = np.asarray(decode(api, sampling, ignore, params, cache, first, key)[0]).T.tolist()
    return [until_end(row, sampling) for row in rows]


def ignore(tokens: np.ndarray) -> None:
    """A callback that does nothing: the text is shown when it is complete."""


def until_end(tokens: list[int], sampling: Sampling) -> list[int]:
    ends = [i for i, token in enumerate(tokens) if token in (*sampling.end, -1)]
    return tokens[: ends[0]] if ends else tokens


# -- all of it --------------------------------------------------------------------------------------------------------


def passage(text: Text, config: LlamaConfig, count: int) -> Int[np.ndarray, " T_plus_1"]:
    """The tokens of the passage: one to start with and `count` to predict."""
    encoded = text.encode(topics[TOPIC])
    check_tokens(config, encoded)
    tokens = np.array(encoded, np.int32)
    available = min(len(tokens) - 1, config.max_length)
    if not 0 < count <= available:
        raise ValueError(f"Text and model allow tokens=1 to {available}: tokens={count}. Pass another --tokens.")
    return tokens[: count + 1]


def check_plot(path: Path | None) -> None:
    """Checks the file of the plot before the measurements, which take minutes."""
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path is not None and not (path.parent.is_dir() and path.suffix[1:] in kinds):
        raise ValueError(f"A plot needs an existing folder and one of the file types {kinds}: --plot={str(path)!r}.")


def measure(
    config: LlamaConfig, params: Params, tokens: np.ndarray, prompts: list[list[int]], sampling: Sampling
) -> list[Result]:
    results: list[Result] = []
    layers: list[LayerRun] = []
    for cache_dtype in (bar := tqdm(CACHE_DTYPES, unit="cache", leave=False)):
        bar.set_description(cache_dtype)
        config = replace(config, cache_dtype=cache_dtype)
        reading = read(config, params, tokens)
        layers = layers or reading.layers  # of float32, which comes first
        errors = layer_errors(config, params, layers) if results else []
        answers = write(config, params, prompts, sampling)
        results.append(Result(cache_dtype, cache_bytes_per_token(config), reading.perplexity, answers, errors))
    return results


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", type=Path, help="a GGUF file, or a folder with config.json and safetensors")
    parser.add_argument("--tokens", type=int, default=1024, help="of the passage, to predict")
    parser.add_argument("--plot", type=Path, help="draw the error of each layer into this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Result]:
    options = parse_arguments(arguments)
    with exit_with_a_sentence():
        check_plot(options.plot)
        config, params, metadata = load_checkpoint(options.model)
        text = load_text(metadata)
        tokens = passage(text, config, options.tokens)
        prompts = {PROMPT: text.encode(PROMPT)}
        if text.template is not None:
            prompts[f"{QUESTION} (chat)"] = text.encode_chat(QUESTION)
        sampling = Sampling(NEW_TOKENS, end=tuple(text.end))
        for encoded in prompts.values():
            check_prompt(config, encoded, sampling)
    params = jax.tree.map(jnp.asarray, params)
    results = measure(config, params, tokens, list(prompts.values()), sampling)
    print(
        f"{options.tokens:,} tokens of Python {platform.python_version()}'s manual, topic {TOPIC!r}; "
        f"{NEW_TOKENS} greedy tokens after each of {len(prompts)} prompts\n\n{table(results)}"
    )
    for i, prompt in enumerate(prompts):
        print(f"\n{prompt}\n{side_by_side(results, text, i)}")
    print(f"\nError of each layer's attention by itself, against a float32 cache\n{error_table(results[1:])}")
    if options.plot:
        save_plot(results[1:], options.plot)
    return results


if __name__ == "__main__":
    main()
