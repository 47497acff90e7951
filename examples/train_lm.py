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
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import llama_nnx
import numpy as np
import optax
from command_line import Parser, exit_with_a_sentence
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, UInt8
from llama import Llama, LlamaConfig
from manual import Text, load_text
from tqdm import tqdm
from train_checkpoints import check_folder, open_checkpoints, restore, save
from train_report import Params, Result, decode_speed, save_plot, table, write_text

from mqa_jax import nnx as mqa_nnx

SHOW_EVERY = 10  # steps; showing a loss waits until it is computed


def option(default: Any, meaning: str) -> Any:
    """A setting that is also a command-line option."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that determine a loss curve, with the text. A checkpoint is only resumed with the same settings."""

    kv_heads: int
    heads: int = option(8, "query heads")
    layers: int = option(2, "layers")
    dim: int = option(128, "features of the model")
    hidden: int = option(256, "width of the MLP")
    length: int = option(128, "bytes of a training text")
    batch: int = option(8, "training texts a step")
    steps: int = option(250, "steps to train")
    learning_rate: float = option(5e-3, "its peak; it rises for a tenth of the steps, then falls along a cosine")
    dropout: float = option(0.05, "rate at which attention weights are dropped")
    remat: bool = option(False, "compute layers again in the backward pass, to save memory")
    seed: int = option(0, "of the parameters, the batches and the dropout")
    api: str = option("linen", "linen or nnx: which of Flax's the trained model is written in")

    @property
    def name(self) -> str:
        return {self.heads: "MHA", 1: "MQA"}.get(self.kv_heads, "GQA")

    @property
    def model(self) -> Llama:
        config = LlamaConfig(
            vocabulary=256,
            layers=self.layers,
            dim=self.dim,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim // self.heads,
            max_length=self.length,
            attn_pdrop=self.dropout,
            remat=self.remat,
        )
        return Llama(config)

    @property
    def abstract_nnx_model(self) -> llama_nnx.Llama:
        """The same model in NNX, with shapes for parameters."""
        return nnx.eval_shape(lambda: llama_nnx.Llama(self.model.config, rngs=nnx.Rngs(0)))

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.steps // 10, self.steps, self.learning_rate / 20
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))


class State(NamedTuple):
    """Everything that a step changes, including the losses, so that they are donated, saved and restored with it."""

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    losses: Float[Array, " steps"]  # NaN from `step` on


@functools.partial(jax.jit, static_argnames="settings")
def first_state(settings: Settings) -> State:
    if settings.api == "nnx":
        params = mqa_nnx.to_linen(llama_nnx.Llama(settings.model.config, rngs=nnx.Rngs(settings.seed)))
    else:
        params = settings.model.init(jax.random.key(settings.seed), jnp.zeros((1, 1), jnp.int32))["params"]
    losses = jnp.full(settings.steps, jnp.nan, jnp.float32)
    return State(jnp.int32(0), params, settings.optimizer.init(params), losses)


def mean_loss(model: Llama, params: Params, texts: Int[Array, "B T_plus_1"], **options: Any) -> Float[Array, ""]:
    """The mean loss in nats per byte."""
    logits = model.apply({"params": params}, texts[:, :-1], **options)
    return optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:]).mean()


def mean_loss_nnx(model: Any, params: Params, texts: Int[Array, "B T_plus_1"], dropout: Any) -> Float[Array, ""]:
    """The same of a model of NNX. Its parameters are those of linen, so checkpoints and measurements serve both."""
    logits = mqa_nnx.with_params(model, params)(texts[:, :-1], deterministic=False, rngs=nnx.Rngs(dropout=dropout))
    return optax.softmax_cross_entropy_with_integer_labels(logits, texts[:, 1:]).mean()


def make_step(settings: Settings) -> Callable[[State, UInt8[Array, " bytes"]], State]:
    """One compiled step of training; batch and dropout depend only on the seed and the number of the step."""
    loss_of: Callable[[Params, Array, Array], Array]
    if settings.api == "nnx":
        loss_of = functools.partial(mean_loss_nnx, settings.abstract_nnx_model)
    else:
        loss_of = lambda params, texts, key: mean_loss(
            settings.model, params, texts, deterministic=False, rngs={"dropout": key}
        )

    def step(state: State, train: UInt8[Array, " bytes"]) -> State:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        batch_key, dropout_key = jax.random.split(key)
        starts = jax.random.randint(batch_key, (settings.batch, 1), 0, train.size - settings.length)
        texts = train[starts + jnp.arange(settings.length + 1)].astype(jnp.int32)
        loss, gradients = jax.value_and_grad(loss_of)(state.params, texts, dropout_key)
        updates, optimizer = settings.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, optimizer, state.losses.at[state.step].set(loss))

    chex.clear_trace_counter()  # it counts by source code, which is the same for all models
    return jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)


@functools.partial(jax.jit, static_argnames="settings")
def evaluate(settings: Settings, params: Params, held_out: UInt8[Array, " bytes"]) -> Float[Array, ""]:
    """The mean loss over consecutive texts."""
    size = settings.batch * (settings.length + 1)
    batches = held_out[: held_out.size // size * size].reshape(-1, settings.batch, settings.length + 1)
    return lax.map(lambda texts: mean_loss(settings.model, params, texts.astype(jnp.int32)), batches).mean()


def record_of(settings: Settings, text: Text) -> dict[str, Any]:
    """The record of a run that must be equal when it is resumed."""
    return asdict(settings) | {"text_checksum": text.checksum}


def train(settings: Settings, text: Text, folder: Path, save_every: int) -> State:
    """Trains from the last checkpoint in `folder`, or from the start, to the last step."""
    record = record_of(settings, text)
    step = make_step(settings)
    with open_checkpoints(folder) as manager:
        state = restore(manager, first_state(settings), record)
        done = int(state.step)
        with tqdm(total=settings.steps, initial=done, desc=settings.name, unit="step") as bar:
            for number in range(done + 1, settings.steps + 1):
                state = step(state, text.train)
                if number % SHOW_EVERY == 0:
                    bar.set_postfix(loss=f"{state.losses[number - 1]:.3f}", refresh=False)
                if number % save_every == 0 or number == settings.steps:
                    save(manager, state, record)
                bar.update()
    return state


def check(options: argparse.Namespace, text: Text) -> None:
    """Checks the options before training."""
    lower: dict[str, float] = dict(
        heads=1, layers=1, dim=1, hidden=1, steps=1, batch=1, length=2, seed=0, dropout=0, temperature=0
    )
    lower |= dict(learning_rate=0, checkpoint_every=1, decode_rows=1, decode_length=32)
    upper: dict[str, float] = dict(dropout=1, seed=2**31)
    if options.api not in ("linen", "nnx"):
        raise ValueError(f"--api is linen or nnx: api={options.api!r}.")
    for name, bound in lower.items():
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if not bound <= value < math.inf:
            raise ValueError(f"{option} must be at least {bound}: {name}={value}.")
        if name in upper and value >= upper[name]:
            raise ValueError(f"{option} must be less than {upper[name]}: {name}={value}.")
    if len(set(options.kv_heads)) != len(options.kv_heads):
        raise ValueError(f"--kv-heads names each model once: kv_heads={options.kv_heads}.")
    if options.batch * (options.length + 1) > text.held_out.size:
        raise ValueError(
            f"A batch must fit into the {text.held_out.size} bytes that are held out: batch={options.batch}, "
            f"length={options.length}. Make one of them smaller."
        )
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
    parser = Parser(__doc__)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2, 1], help="one model for each")
    for setting in fields(Settings)[1:]:
        flag = "--" + setting.name.replace("_", "-")
        kind: Any = dict(action="store_true") if setting.type is bool else dict(type=setting.type)
        parser.add_argument(flag, default=setting.default, help=setting.metadata["help"], **kind)
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="folder for checkpoints and loss.png")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--prompt", default="The ", help="what each model continues")
    parser.add_argument("--temperature", type=float, default=0.5, help="of these samples; 0 is greedy")
    parser.add_argument("--decode-rows", type=int, default=16, help="rows in the measurement of decoding")
    parser.add_argument("--decode-length", type=int, default=1024, help="positions of the cache in it")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, text: Text) -> dict[Path, Settings]:
    """The runs and their folders, after all checks."""
    check(options, text)
    shared = {setting.name: getattr(options, setting.name) for setting in fields(Settings)[1:]}
    runs = {options.out / f"kv_heads_{kv}": Settings(kv_heads=kv, **shared) for kv in options.kv_heads}
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
