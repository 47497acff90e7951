"""Trains small language models with multi-head, grouped-query and multi-query attention, and compares them.

    python examples/train_lm.py
    python examples/train_lm.py --kv-heads 8 4 2 1 --steps 1000 --dropout 0.1 --out runs/longer
    python examples/train_lm.py --resume        # continues a stopped run, with the same losses
    python examples/train_lm.py --api nnx       # trains the model of llama_nnx.py

The text is Python's own manual, `pydoc_data.topics`, byte by byte; the end of each topic is held out. The model is that
of `llama.py`. It takes about a minute and a half on two CPU cores, prints a table, and draws the loss curves.
"""

import argparse
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import llama_nnx
import numpy as np
import optax
from command_line import exit_with_a_sentence
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, UInt8
from llama import Llama, LlamaConfig
from manual import Text, load_text
from tqdm import tqdm
from train_checkpoints import check_folder, open_checkpoints, restore, save
from train_report import Params, Result, decode_speed, save_plot, table, write_text
from train_settings import Settings, check_bounds, check_settings, settings_of, training_parser

from mqa_jax import nnx as mqa_nnx

SHOW_EVERY = 10  # steps; showing a loss waits until it is computed


Texts = tuple[Int[Array, "B T"], Int[Array, "B T"]]  # tokens, and the one that follows each


class State(NamedTuple):
    """Everything that a step changes, including the losses, so that they are donated, saved and restored with it."""

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    losses: Float[Array, " steps"]  # NaN from `step` on


@functools.partial(jax.jit, static_argnames="settings")
def first_state(settings: Settings) -> State:
    if settings.api == "nnx":
        params = mqa_nnx.to_linen(llama_nnx.Llama(settings.config, rngs=nnx.Rngs(settings.seed)))
    else:
        params = settings.model.init(jax.random.key(settings.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    losses = jnp.full(settings.steps, jnp.nan, jnp.float32)
    return State(jnp.int32(0), params, settings.optimizer.init(params), losses)


def tokens_and_labels(texts: Int[Array, "B T_plus_1"]) -> Texts:
    return texts[:, :-1], texts[:, 1:]


def mean_loss(model: Llama, params: Params, texts: Texts, **options: Any) -> Float[Array, ""]:
    """The mean loss in nats per byte."""
    tokens, labels = texts
    logits = model.apply({"params": params}, tokens, **options)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mean_loss_nnx(model: Any, params: Params, texts: Texts, dropout: Any) -> Float[Array, ""]:
    """The same of a model of NNX. Its parameters are those of linen, so checkpoints and measurements serve both."""
    tokens, labels = texts
    logits = mqa_nnx.with_params(model, params)(tokens, deterministic=False, rngs=nnx.Rngs(dropout=dropout))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def loss_function(settings: Settings, config: LlamaConfig) -> Callable[[Params, Texts, Array], Float[Array, ""]]:
    """The mean loss in training, of parameters, texts and a random key."""
    if settings.api == "nnx":
        abstract = nnx.eval_shape(lambda: llama_nnx.Llama(config, rngs=nnx.Rngs(0)))  # shapes for parameters
        return functools.partial(mean_loss_nnx, abstract)
    return lambda params, texts, key: mean_loss(
        Llama(config), params, texts, deterministic=False, rngs={"dropout": key}
    )


def make_step(
    settings: Settings,
    config: LlamaConfig | None = None,
    place: Callable[[Array], Array] = lambda texts: texts,
    **compiling: Any,
) -> Callable[[State, UInt8[Array, " bytes"]], State]:
    """One compiled step of training; batch and dropout depend only on the seed and the number of the step.

    `config`: of the model, by default that of the settings. `place`: how devices share the tokens of a step, and their
    labels. `compiling`: options of `jax.jit`.
    """
    loss_of = loss_function(settings, settings.config if config is None else config)

    def step(state: State, train: UInt8[Array, " bytes"]) -> State:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        batch_key, dropout_key = jax.random.split(key)
        starts = jax.random.randint(batch_key, (settings.batch, 1), 0, train.size - settings.length)
        texts = tokens_and_labels(train[starts + jnp.arange(settings.length + 1)].astype(jnp.int32))
        loss, gradients = jax.value_and_grad(loss_of)(state.params, (place(texts[0]), place(texts[1])), dropout_key)
        updates, optimizer = settings.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, optimizer, state.losses.at[state.step].set(loss))

    chex.clear_trace_counter()  # it counts by source code, which is the same for all models
    return jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0, **compiling)


@functools.partial(jax.jit, static_argnames="settings")
def evaluate(settings: Settings, params: Params, held_out: UInt8[Array, " bytes"]) -> Float[Array, ""]:
    """The mean loss over consecutive texts."""
    size = settings.batch * (settings.length + 1)
    batches = held_out[: held_out.size // size * size].reshape(-1, settings.batch, settings.length + 1)
    loss = lambda texts: mean_loss(settings.model, params, tokens_and_labels(texts.astype(jnp.int32)))
    return lax.map(loss, batches).mean()


def record_of(settings: Settings, text: Text) -> dict[str, Any]:
    """The record of a run that must be equal when it is resumed."""
    return asdict(settings) | {"text_checksum": text.checksum}


def train(
    settings: Settings,
    text: Text,
    folder: Path,
    save_every: int,
    state: State | None = None,
    step: Callable[[State, Array], State] | None = None,
    last: int | None = None,
) -> State:
    """Trains from the last checkpoint in `folder`, or from `state`, by default the first, to the step `last`."""
    record, last = record_of(settings, text), settings.steps if last is None else last
    step = make_step(settings) if step is None else step
    with open_checkpoints(folder) as manager:
        state = restore(manager, first_state(settings) if state is None else state, record)
        done = int(state.step)
        quiet = jax.process_index() > 0
        with tqdm(total=last, initial=done, desc=settings.name, unit="step", disable=quiet) as bar:
            for number in range(done + 1, last + 1):
                state = step(state, text.train)
                if number % SHOW_EVERY == 0:
                    bar.set_postfix(loss=f"{state.losses[number - 1]:.3f}", refresh=False)
                if number % save_every == 0 or number == last:
                    save(manager, state, record)
                bar.update()
    return state


def check(options: argparse.Namespace, text: Text) -> None:
    """Checks the options before training."""
    check_settings(options, text)
    check_bounds(options, dict(temperature=0, decode_rows=1, decode_length=32), {})
    if len(set(options.kv_heads)) != len(options.kv_heads):
        raise ValueError(f"--kv-heads names each model once: kv_heads={options.kv_heads}.")
    if not 0 < len(options.prompt.encode()) < options.length:
        raise ValueError(
            f"A prompt must have at least one byte, and fewer than a training text: prompt={options.prompt!r}, "
            f"length={options.length}. Use another prompt, or a larger length."
        )


def measure(settings: Settings, text: Text, state: State, options: argparse.Namespace) -> Result:
    """The measurements of a trained model for the table and the plot."""
    model, params = settings.model, state.params
    prompt = jnp.frombuffer(options.prompt.encode(), jnp.uint8)[None].astype(jnp.int32)
    written = write_text(model, params, prompt, settings.length - prompt.size, options.temperature, settings.seed)
    speed = decode_speed(model, params, rows=options.decode_rows, length=options.decode_length)
    return Result(
        name=settings.name,
        kv_heads=settings.kv_heads,
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        losses=np.asarray(state.losses),
        held_out=float(evaluate(settings, params, text.held_out)),
        cache_bytes_per_token=speed.cache_bytes_per_token,
        tokens_per_second=speed.tokens_per_second,
        sample=options.prompt + bytes(written[0].tolist()).decode(errors="replace"),
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, "runs/train_lm")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2, 1], help="one model for each")
    parser.add_argument("--prompt", default="The ", help="what each model continues")
    parser.add_argument("--temperature", type=float, default=0.5, help="of these samples; 0 is greedy")
    parser.add_argument("--decode-rows", type=int, default=16, help="rows in the measurement of decoding")
    parser.add_argument("--decode-length", type=int, default=1024, help="positions of the cache in it")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, text: Text) -> dict[Path, Settings]:
    """The runs and their folders, after all checks."""
    check(options, text)
    runs = {options.out / f"kv_heads_{kv}": settings_of(options, kv) for kv in options.kv_heads}
    for folder, settings in runs.items():
        jax.eval_shape(functools.partial(first_state, settings))  # raises if the settings are invalid
        check_folder(folder, record_of(settings, text), options.resume)
    return runs


def compare(options: argparse.Namespace, text: Text, runs: dict[Path, Settings]) -> list[Result]:
    results = []
    for folder, settings in runs.items():
        state = train(settings, text, folder, options.checkpoint_every)
        results.append(measure(settings, text, state, options))
        print(f"\n{settings.name} writes: {results[-1].sample}\n", flush=True)
    print(table(results))
    save_plot(results, options.out / "loss.png")
    print(f"\nloss curves: {options.out / 'loss.png'}")
    return results


def main(
    arguments: list[str] | None = None, refuse: Callable[[], AbstractContextManager] = nullcontext
) -> list[Result]:
    """`refuse`: the context manager for the checks of the options."""
    options, text = parse_arguments(arguments), load_text()
    with refuse():
        runs = prepare(options, text)
    return compare(options, text, runs)


if __name__ == "__main__":
    main(refuse=exit_with_a_sentence)
