"""Trains a one-step generator with MeanFlow, whose loss contains a forward-mode derivative through attention.

    python examples/meanflow.py
    python examples/meanflow.py --steps 6000 --layers 4 --out runs/longer
    python examples/meanflow.py --memory    # of a training step, for 1024, 2048 and 4096 tokens; trains nothing

A sample is a closed curve with two or three lobes, turned by any angle; its tokens are points of the plane. The
network u(z, r, t) is a transformer like DiT (Peebles and Xie 2023, arXiv 2212.09748) that learns the mean velocity from
time t to time r, so that one step from noise at time 1 is a sample: x = z - u(z, 0, 1) (Geng et al. 2025, arXiv
2505.13447, algorithms 1 and 2). It takes about a minute on two CPU cores, and draws the loss and samples beside data.
"""

import argparse
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
from command_line import Parser, exit_with_a_sentence, option
from jaxtyping import Array, Float, PRNGKeyArray
from lobed_curves import LOBES, curves, draw, nearest, plot
from tqdm import tqdm
from train_report import Params, aligned, smooth

import mqa_jax

AVERAGED = 0.98  # of the mean of the parameters that samples are drawn with, a step keeps so much
SHOW_EVERY = 20  # steps; showing a loss waits until it is computed
LENGTHS = 1024, 2048, 4096  # tokens, in the table of memory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that determine a loss curve."""

    points: int = option(16, "points of a curve, the tokens of a sample")
    heads: int = option(4, "query heads")
    kv_heads: int = option(1, "key/value heads")
    layers: int = option(2, "layers")
    dim: int = option(64, "features of the model")
    batch: int = option(64, "samples a step")
    steps: int = option(2000, "steps to train")
    learning_rate: float = option(2e-3, "its peak; it rises for a twentieth of the steps, then falls along a cosine")
    apart: float = option(0.5, "share of the samples whose times r and t differ; the others learn the velocity at t")
    seed: int = option(0, "of the parameters, the batches and the samples")
    attn_impl: str = option("flash", "attention: flash (the fastest), xla, or reference (the textbook's)")

    @property
    def model(self) -> "MeanVelocity":
        return MeanVelocity(self.dim, self.heads, self.kv_heads, self.layers, self.attn_impl)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, self.steps // 20, self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))


# -- the network ------------------------------------------------------------------------------------------------------


def waves(x: Float[Array, " X"], features: int, fastest: float) -> Float[Array, "X features"]:
    """Sines and cosines of a number, of periods from 16 down to 1 / fastest."""
    angle = x[:, None] * 2 * math.pi * jnp.geomspace(1 / 16, fastest, features // 2)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Layer(nn.Module):
    """Attention and an MLP, whose inputs and outputs are scaled and moved by the condition, at first by 0."""

    heads: int
    kv_heads: int
    attn_impl: str

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], condition: Float[Array, "B D"]) -> Float[Array, "B T D"]:
        dim = x.shape[-1]
        modulation = nn.Dense(6 * dim, kernel_init=nn.initializers.zeros)(nn.silu(condition))[:, None]
        move, scale, gate, move_mlp, scale_mlp, gate_mlp = jnp.split(modulation, 6, axis=-1)
        norm = lambda x: nn.LayerNorm(use_bias=False, use_scale=False)(x)
        attention = mqa_jax.GroupedQueryAttention(
            dim, self.heads, kv_heads=self.kv_heads, causal=False, attn_impl=self.attn_impl
        )
        x = x + gate * attention(norm(x) * (1 + scale) + move)[0]
        hidden = nn.gelu(nn.Dense(4 * dim)(norm(x) * (1 + scale_mlp) + move_mlp))
        return x + gate_mlp * nn.Dense(dim)(hidden)


class MeanVelocity(nn.Module):
    """u(z, r, t): the mean of the velocity from time r to time t on the way that leads through z at time t."""

    dim: int
    heads: int
    kv_heads: int
    layers: int
    attn_impl: str

    @nn.compact
    def __call__(self, z: Float[Array, "B T 2"], r: Float[Array, " B"], t: Float[Array, " B"]) -> Float[Array, "B T 2"]:
        times = jnp.concatenate([waves(x, self.dim, fastest=1) for x in (t, t - r)], axis=-1)
        condition = nn.Dense(self.dim)(nn.silu(nn.Dense(self.dim)(times)))
        place = nn.Dense(self.dim)(waves(jnp.arange(z.shape[1]) / z.shape[1], self.dim, fastest=4))
        x = nn.Dense(self.dim)(z) + place
        for _ in range(self.layers):
            x = Layer(self.heads, self.kv_heads, self.attn_impl)(x, condition)
        return nn.Dense(2, kernel_init=nn.initializers.zeros)(nn.LayerNorm()(x))


# -- MeanFlow ---------------------------------------------------------------------------------------------------------


def mean_flow_loss(
    model: MeanVelocity, params: Params, data: Float[Array, "B T 2"], key: PRNGKeyArray, apart: float
) -> tuple[Array, Array]:
    """The weighted loss, which is differentiated, and the squared error, which is shown."""
    of_noise, of_times, of_apart = jax.random.split(key, 3)
    noise = jax.random.normal(of_noise, data.shape)
    times = jax.random.uniform(of_times, (2, data.shape[0]))
    r, t = jnp.min(times, axis=0), jnp.max(times, axis=0)
    r = jnp.where(jax.random.uniform(of_apart, t.shape) < apart, r, t)
    velocity = noise - data
    z = data + t[:, None, None] * velocity
    u = functools.partial(model.apply, {"params": params})
    mean, change = jax.jvp(u, (z, r, t), (velocity, jnp.zeros_like(r), jnp.ones_like(t)))
    target = jax.lax.stop_gradient(velocity - (t - r)[:, None, None] * change)
    error = jnp.sum((mean - target) ** 2, axis=(1, 2))
    weight = jax.lax.stop_gradient(1 / (error + 1e-3))
    return jnp.mean(weight * error), jnp.mean(error) / data.shape[1]


class State(NamedTuple):
    """What a step changes."""

    params: Params
    mean_params: Params
    optimizer: Any


@functools.partial(jax.jit, static_argnames="settings")
def first_state(settings: Settings) -> State:
    zero = jnp.zeros(1)
    params = settings.model.init(jax.random.key(settings.seed), jnp.zeros((1, settings.points, 2)), zero, zero)
    return State(params["params"], params["params"], settings.optimizer.init(params["params"]))


@functools.partial(jax.jit, static_argnames="settings")
def train_step(settings: Settings, state: State, number: Array) -> tuple[State, Array]:
    """The state after a step, and its squared error. What is drawn depends on the seed and the step's number alone."""
    of_data, of_loss = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), number))
    data = draw(of_data, settings.batch, settings.points)
    loss = lambda params: mean_flow_loss(settings.model, params, data, of_loss, settings.apart)
    gradients, error = jax.grad(loss, has_aux=True)(state.params)
    updates, optimizer = settings.optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    mean = jax.tree.map(lambda mean, x: mean * AVERAGED + x * (1 - AVERAGED), state.mean_params, params)
    return State(params, mean, optimizer), error


@functools.partial(jax.jit, static_argnames=("settings", "count"))
def sample(settings: Settings, params: Params, key: PRNGKeyArray, count: int) -> Float[Array, "B T 2"]:
    """Draws samples, in one step from noise."""
    z = jax.random.normal(key, (count, settings.points, 2))
    mean: Any = settings.model.apply({"params": params}, z, jnp.zeros(count), jnp.ones(count))
    return z - mean


def train(settings: Settings) -> tuple[State, Float[np.ndarray, " steps"]]:
    """The last state and the squared errors of all steps."""
    state, errors = first_state(settings), []
    with tqdm(total=settings.steps, desc="MeanFlow", unit="step") as bar:
        for number in range(settings.steps):
            state, error = train_step(settings, state, jnp.int32(number))
            errors.append(error)
            if (number + 1) % SHOW_EVERY == 0:
                bar.set_postfix(error=f"{error:.3f}", refresh=False)
            bar.update()
    return state, np.asarray(errors)


# -- the report -------------------------------------------------------------------------------------------------------


def report(settings: Settings, params: Params, count: int = 1000) -> str:
    """How far samples are from curves of the data, beside the mean of all data, a circle; and their lobes."""
    samples = sample(settings, params, jax.random.key(settings.seed + 1), count)
    distance, lobes = nearest(samples)
    of_circle, _ = nearest(curves(jnp.zeros(1, jnp.int32), jnp.zeros(1), settings.points) / 1.5)
    shares = ", ".join(f"{n} lobes {np.mean(lobes == n):.0%}" for n in LOBES)
    return (
        f"distance from the nearest curve, whose mean radius is 1: {np.median(distance):.3f} in the median of {count} "
        f"samples, {of_circle[0]:.3f} of a circle\n{shares} (of data: {1 / len(LOBES):.0%} each)"
    )


def save_plot(settings: Settings, params: Params, errors: Float[np.ndarray, " steps"], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(12, 4), layout="constrained")  # not pyplot, which may need a display
    left, middle, right = figure.subplots(1, 3)
    smoothed, steps = smooth(errors), len(errors)
    left.plot(np.arange(steps - len(smoothed), steps) + 1, smoothed)
    left.set(xlabel="step", ylabel="squared error of a point", title=f"Mean of {steps - len(smoothed) + 1} steps")
    left.grid(alpha=0.3)
    key = jax.random.key(settings.seed + 2)
    plot(middle, draw(key, 25, settings.points))
    plot(right, sample(settings, params, key, 25))
    middle.set(title="Data")
    right.set(title="Samples, in one step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def step_memory(settings: Settings) -> int:
    """Bytes of temporary memory of a compiled training step."""
    state = jax.eval_shape(functools.partial(first_state, settings))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    memory: Any = train_step.lower(settings, state, number).compile().memory_analysis()
    return memory.temp_size_in_bytes


def memory_table(settings: Settings, lengths: tuple[int, ...] = LENGTHS) -> str:
    """Temporary memory of a step for one sample, with the fused attention and with the textbook's."""
    rows = [["tokens", settings.attn_impl, "reference", "times"]]
    for length in lengths:
        one = replace(settings, points=length, batch=1)
        ours, plain = step_memory(one), step_memory(replace(one, attn_impl="reference"))
        rows.append([f"{length}", f"{ours / 2**20:.0f} MiB", f"{plain / 2**20:.0f} MiB", f"{plain / ours:.1f}"])
    return f"Temporary memory of a training step, for one sample:\n{aligned(rows)}"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_settings(fields(Settings))
    parser.add_argument("--out", type=Path, default=Path("runs/meanflow"), help="folder for meanflow.png")
    parser.add_argument("--memory", action="store_true", help="print the temporary memory of a step and train nothing")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> Settings:
    """The settings, after all checks."""
    settings = Settings(**{setting.name: getattr(options, setting.name) for setting in fields(Settings)})
    lower: dict[str, float] = dict(
        points=3, heads=1, kv_heads=1, layers=1, dim=2, batch=1, steps=1, learning_rate=0, apart=0, seed=0
    )
    upper: dict[str, float] = dict(apart=1, seed=2**31 - 3)
    for name, bound in lower.items():
        value, flag = getattr(settings, name), f"--{name.replace('_', '-')}"
        if not bound <= value < math.inf:
            raise ValueError(f"{flag} must be at least {bound}: {name}={value}.")
        if value > upper.get(name, math.inf):
            raise ValueError(f"{flag} must be at most {upper[name]}: {name}={value}.")
    if settings.dim % 2 != 0:
        raise ValueError(f"--dim must be even, for sines and cosines: dim={settings.dim}.")
    jax.eval_shape(functools.partial(train_step, settings), jax.eval_shape(lambda: first_state(settings)), jnp.int32(0))
    return settings


def main(arguments: list[str] | None = None, refuse: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """`refuse`: the context manager for the checks of the options."""
    options = parse_arguments(arguments)
    with refuse():
        settings = check(options)
    if options.memory:
        print(memory_table(settings))
        return
    state, errors = train(settings)
    print(report(settings, state.mean_params))
    save_plot(settings, state.mean_params, errors, options.out / "meanflow.png")
    print(f"\nloss and samples: {options.out / 'meanflow.png'}")


if __name__ == "__main__":
    main(refuse=exit_with_a_sentence)
