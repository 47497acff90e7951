"""Trains the language model of `train_lm.py` on a mesh of devices, and goes on with it on another mesh.

    python examples/train_sharded.py --devices 8 --model-axis 2 --stop-at 125     # 4 x 2 virtual devices of this CPU
    python examples/train_sharded.py --devices 4 --model-axis 1 --resume          # 4 x 1, the same losses
    python examples/train_sharded.py --devices 8 --sequence-axis 4 --order zigzag --out runs/cut     # 4 share a text

    python examples/train_sharded.py --coordinator HOST:PORT --processes 2 --process 0     # and 1, on another machine

The mesh axis `model` cuts the heads of attention, `sequence` each text, `data` the texts of a batch, the kernels and
what the optimizer keeps of them. Each process has all devices that JAX finds on its machine, or `--devices` of its CPU.
Processes need a folder `--out` that all of them see. `loss.png` shows which mesh computed which steps.
"""

import argparse
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
from command_line import exit_with_a_sentence
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from llama import LlamaConfig
from manual import Text, load_text
from train_checkpoints import check_folder, open_checkpoints, saved_step
from train_lm import State, evaluate, first_state, make_step, record_of, train
from train_report import smooth
from train_settings import Settings, check_settings, settings_of, training_parser

import mqa_jax


def start(options: argparse.Namespace) -> None:
    """Says which devices JAX has, before it looks for them."""
    given = {name: getattr(options, name) for name in ("coordinator", "processes", "process")}
    if len({x is None for x in given.values()}) > 1:
        raise ValueError(f"Several processes need all of --coordinator, --processes and --process: {given}.")
    if options.devices is not None:
        if options.devices < 1:
            raise ValueError(f"--devices must be at least 1: devices={options.devices}.")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.coordinator is not None:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)


def make_mesh(options: argparse.Namespace) -> Mesh:
    """All devices of all processes; neighbours share the heads of a layer."""
    count, model, sequence = jax.device_count(), options.model_axis, options.sequence_axis
    if min(model, sequence) < 1 or count % (model * sequence):
        raise ValueError(
            "--model-axis times --sequence-axis must divide the number of devices: "
            f"model_axis={model}, sequence_axis={sequence}, devices={count}."
        )
    data = count // (model * sequence)
    if options.heads % model or options.batch % data:
        raise ValueError(
            "Heads are cut over the model axis, a batch over the data axis: "
            f"heads={options.heads}, model_axis={model}, batch={options.batch}, data axis={data}."
        )
    if options.length % (sequence * (1 + (options.order == "zigzag"))):
        raise ValueError(
            "A text is cut over the sequence axis, into two chunks for each device in zigzag order: "
            f"length={options.length}, sequence_axis={sequence}, order={options.order}."
        )
    return jax.make_mesh((data, sequence, model), ("data", "sequence", "model"), axis_types=(AxisType.Auto,) * 3)


def cut_config(options: argparse.Namespace, settings: Settings) -> LlamaConfig:
    """That of the same model, with attention over texts that are cut."""
    if options.sequence_axis == 1:
        return settings.config
    axis = mqa_jax.SequenceAxis("sequence", order=options.order, batch_axis="data", heads_axis="model")
    return replace(settings.config, sequence_axis=axis)


def shardings_of(settings: Settings, mesh: Mesh) -> State:
    """Of parameters and of what the optimizer keeps for each of them, which has the same names.

    `partition_specs` knows those of attention. Other matrices are cut along their first axis, where that is possible.
    """
    data, model = mesh.shape["data"], mesh.shape["model"]
    shapes = jax.eval_shape(functools.partial(first_state, settings))
    kv_heads = "model" if settings.kv_heads % model == 0 else None
    specs = mqa_jax.partition_specs(shapes, heads="model", kv_heads=kv_heads, embed="data")

    def sharding(spec: PartitionSpec, x: Any) -> NamedSharding:
        is_cut = x.ndim == 2 and x.shape[0] % data == 0 and not any(spec)
        return NamedSharding(mesh, PartitionSpec("data") if is_cut else spec)

    return jax.tree.map(sharding, specs, shapes)


def run(options: argparse.Namespace, settings: Settings, text: Text, mesh: Mesh) -> tuple[int, State]:
    """Trains on the mesh; also returns the number of steps that were done before."""
    shardings, whole = shardings_of(settings, mesh), NamedSharding(mesh, PartitionSpec())
    with open_checkpoints(options.out) as manager:
        before = saved_step(manager, record_of(settings, text)) or 0
    state = jax.jit(functools.partial(first_state, settings), out_shardings=shardings)()

    def share(tokens: Array) -> Array:
        ordered = mqa_jax.zigzag(tokens, mesh.shape["sequence"]) if options.order == "zigzag" else tokens
        return lax.with_sharding_constraint(ordered, NamedSharding(mesh, PartitionSpec("data", "sequence")))

    step = make_step(settings, cut_config(options, settings), share, out_shardings=shardings)
    print_once(holdings(state.params, mesh))
    text = jax.device_put(jax.tree.map(np.asarray, text), whole)
    with jax.set_mesh(mesh):  # where attention finds it
        state = train(settings, text, options.out, options.checkpoint_every, state, step, options.stop_at)
    held_out = float(evaluate(settings, state.params, text.held_out))
    losses = np.asarray(state.losses)[: int(state.step)]
    print_once(f"step {losses.size}: loss {smooth(losses)[-1]:.3f}, held out {held_out:.3f}, in nats per byte")
    return before, state


def holdings(params: Any, mesh: Mesh) -> str:
    arrays = jax.tree.leaves(params)
    own = sum(int(np.prod(x.sharding.shard_shape(x.shape))) for x in arrays)
    every = sum(x.size for x in arrays)
    return f"mesh {name_of(mesh)}: a device holds {own:,} of {every:,} parameters"


def name_of(mesh: Mesh) -> str:
    return " x ".join(f"{size} {name}" for name, size in mesh.shape.items())


def print_once(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def save_plot(losses: Float[np.ndarray, " steps"], before: int, mesh: Mesh, path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(losses.size) + 1
    if before:
        axes.plot(steps[:before], losses[:before], label=f"steps 1 to {before}, from a checkpoint")
    if before < losses.size:
        axes.plot(steps[before:], losses[before:], label=f"steps {before + 1} to {losses.size}, mesh {name_of(mesh)}")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Loss in training, over meshes of devices")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = training_parser(__doc__, "runs/train_sharded")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads")
    parser.add_argument("--model-axis", type=int, default=1, help="devices that share the heads of a layer")
    parser.add_argument("--sequence-axis", type=int, default=1, help="devices that share a text")
    parser.add_argument("--order", choices=("contiguous", "zigzag"), default="contiguous", help="of its tokens on them")
    parser.add_argument("--devices", type=int, help="virtual devices of this CPU; default: those that JAX finds")
    parser.add_argument("--stop-at", type=int, help="step after which to stop; default: the last")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where there are several")
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0 on")
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace) -> tuple[Settings, Text, Mesh]:
    start(options)
    text = load_text()
    check_settings(options, text)
    if options.stop_at is not None and not 1 <= options.stop_at <= options.steps:
        raise ValueError(f"--stop-at must be one of the steps: stop_at={options.stop_at}, steps={options.steps}.")
    settings, mesh = settings_of(options, options.kv_heads), make_mesh(options)
    jax.eval_shape(functools.partial(first_state, settings))  # raises if the settings are invalid
    check_folder(options.out, record_of(settings, text), options.resume)
    return settings, text, mesh


def main(
    arguments: list[str] | None = None, refuse: Callable[[], AbstractContextManager] = nullcontext
) -> Float[np.ndarray, " steps"]:
    """The losses. `refuse`: the context manager for the checks of the options."""
    options = parse_arguments(arguments)
    with refuse():
        settings, text, mesh = prepare(options)
    before, state = run(options, settings, text, mesh)
    losses = np.asarray(state.losses)[: int(state.step)]
    if jax.process_index() == 0:
        save_plot(losses, before, mesh, options.out / "loss.png")
    print_once(f"loss curve: {options.out / 'loss.png'}")
    return losses


if __name__ == "__main__":
    main(refuse=exit_with_a_sentence)
