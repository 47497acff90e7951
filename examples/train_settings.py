"""The settings of `train_lm.py` and `train_sharded.py`, their options on the command line, and which are legal."""

import argparse
import math
from dataclasses import dataclass, fields
from pathlib import Path

import optax
from command_line import Parser, option
from llama import Llama, LlamaConfig
from manual import Text


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
    def config(self) -> LlamaConfig:
        return LlamaConfig(
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

    @property
    def model(self) -> Llama:
        return Llama(self.config)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.steps // 10, self.steps, self.learning_rate / 20
        )
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))


def training_parser(description: str | None, out: str) -> Parser:
    """With the options of all settings but `kv_heads`, and those of a run."""
    parser = Parser(description)
    parser.add_settings(fields(Settings)[1:])
    parser.add_argument("--out", type=Path, default=Path(out), help="folder for checkpoints and loss.png")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parser.add_argument("--checkpoint-every", type=int, default=50, help="steps between checkpoints")
    return parser


def settings_of(options: argparse.Namespace, kv_heads: int) -> Settings:
    return Settings(kv_heads=kv_heads, **{each.name: getattr(options, each.name) for each in fields(Settings)[1:]})


def check_settings(options: argparse.Namespace, text: Text) -> None:
    """Checks the options of a training before it."""
    if options.api not in ("linen", "nnx"):
        raise ValueError(f"--api is linen or nnx: api={options.api!r}.")
    lower: dict[str, float] = dict(heads=1, layers=1, dim=1, hidden=1, steps=1, batch=1, length=2, seed=0, dropout=0)
    check_bounds(options, lower | dict(learning_rate=0, checkpoint_every=1), dict(dropout=1, seed=2**31))
    if options.batch * (options.length + 1) > text.held_out.size:
        raise ValueError(
            f"A batch must fit into the {text.held_out.size} bytes that are held out: batch={options.batch}, "
            f"length={options.length}. Make one of them smaller."
        )


def check_bounds(options: argparse.Namespace, lower: dict[str, float], upper: dict[str, float]) -> None:
    for name, bound in lower.items():
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if not bound <= value < math.inf:
            raise ValueError(f"{option} must be at least {bound}: {name}={value}.")
        if name in upper and value >= upper[name]:
            raise ValueError(f"{option} must be less than {upper[name]}: {name}={value}.")
