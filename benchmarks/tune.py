"""Times the tiles that each Triton kernel may have on the GPU at hand, and writes the fastest into the table of tiles.

python -m benchmarks.tune
python -m benchmarks.tune --directions forward dkv --dtypes 16-bit --head-dims 128 --seconds 60
python -m benchmarks.tune --quick --out tiles.json

What does not compile, most often for want of shared memory, is counted and left out; so is what gives other numbers
than the tiles that are in the table now, which come first.
"""

import argparse
import collections
import functools
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment, jax_peers, timing
from benchmarks.candidate import Candidate, NotApplicable
from benchmarks.cases import Case
from benchmarks.measure import Row, measure
from benchmarks.model_shapes import SHAPES, ModelShape, shape_of
from benchmarks.problems import Problem, attention_of
from benchmarks.progress import progress_bar
from benchmarks.table import figures, in_columns
from benchmarks.timing import QUICK, Settings
from mqa_jax.checks import checked_inputs
from mqa_jax.inputs import Inputs
from mqa_jax.kernels import row_terms, tile_config, triton, triton_backward, triton_forward, triton_score_gradient
from mqa_jax.kernels.tile_config import TileConfig
from mqa_jax.kernels.triton_backward import Saved
from mqa_jax.options import Options

Kernel = Callable[[Inputs, Saved, TileConfig, bool], Any]
KERNELS: dict[str, Kernel] = {
    "forward": lambda inputs, saved, config, interpret: triton_forward.forward(inputs, config, interpret),
    "dq": triton_backward.d_query,
    "dkv": triton_backward.d_key_and_value,
    "dscore": triton_score_gradient.d_bias,
}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "dscore": 2}  # of matrices, in each tile
MODELS = {64: "SmolLM2-135M", 128: "Llama-3-8B", 256: "Gemma-2B"}  # by head size, whose layers are timed
DTYPES = {"16-bit": "bfloat16", "float32": "float32", "tf32": "float32", "tf32x3": "float32"}  # by kinds of products
PRECISIONS = {"tf32": "TF32_TF32_F32", "tf32x3": "TF32_TF32_F32_X3"}  # that ask for them
# Units in the last place of the largest number, by which results may differ. Those of tf32 are 2^13 of float32.
ROUNDING = {"16-bit": 2, "float32": 64, "tf32": 2 << 13, "tf32x3": 256}
FIRST, FINAL = Settings(turns=1, turn_seconds=0.02), Settings(turns=7, turn_seconds=0.05)
FINALISTS = 5


@dataclass(frozen=True)
class Entry:
    """What is looked for: the tiles of one entry of the table, for the layer of a model.

    Attributes: shape, the layer's; that of MODELS if None.
    """

    direction: str
    dtype: str
    head_dim: int
    batch: int = 4
    length: int = 4096
    shape: ModelShape | None = None

    def __str__(self) -> str:
        return str(self.problem)

    @property
    def problem(self) -> Problem:
        shape = self.shape or SHAPES[MODELS[self.head_dim]]
        return attention_of(shape, self.batch, self.length, dtype=DTYPES[self.dtype])

    @property
    def key(self) -> dict[str, Any]:
        """What names it in the table."""
        return {
            "architecture": tile_config.architecture_at_hand(),
            "direction": self.direction,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
        }

    @property
    def plain(self) -> bool:
        """As in the table: only the gradients of what is added to scores need a problem where something is."""
        return self.direction != "dscore"

    @property
    def flops(self) -> float:
        return self.problem.flops * PRODUCTS[self.direction] / PRODUCTS["forward"]

    def arguments(self, interpret: bool) -> tuple[Inputs, Saved]:
        query, key, value, d_out = jax_peers.on_device(self.problem)
        scores = (1, query.shape[2], self.length, self.length)
        bias = jax.random.normal(jax.random.key(4), scores, query.dtype) if self.direction == "dscore" else None
        options = Options(is_causal=True, precision=PRECISIONS.get(self.dtype))
        inputs = checked_inputs(query, key, value, bias, None, options)
        out, normalizer = jax.jit(functools.partial(triton.forward, interpret=interpret))(inputs)
        delta = row_terms.delta(out, d_out, jnp.zeros_like(normalizer.highest))
        return inputs, Saved(d_out, *(x.swapaxes(1, 2) for x in (*normalizer, delta)))


# -- which tiles ------------------------------------------------------------------------------------------------------

SIDES = {  # rows, columns
    ("forward", "16-bit"): ((64, 128), (32, 64, 128)),
    ("dq", "16-bit"): ((32, 64, 128), (32, 64, 128)),
    ("dkv", "16-bit"): ((32, 64, 128), (32, 64, 128)),
    ("dscore", "16-bit"): ((32, 64, 128), (32, 64, 128)),
    **{(direction, "float32"): ((16, 32, 64), (16, 32, 64)) for direction in KERNELS},
    **{(direction, "tf32"): ((16, 32, 64, 128), (16, 32, 64, 128)) for direction in KERNELS},
    **{(direction, "tf32x3"): ((16, 32, 64), (16, 32, 64)) for direction in KERNELS},
}
MOST_NUMBERS = 256  # float32 of a thread, which has 255 registers


def legal(entry: Entry) -> Iterator[TileConfig]:
    """All that is worth compiling. Products of float32 run without tensor cores, which leaves less to choose."""
    rows, columns = SIDES[entry.direction, entry.dtype]
    whole, half = entry.dtype == "float32", entry.dtype == "16-bit"
    stages = (1, 2, 3, 4) if half else (1, 2) if whole else (1, 2, 3)
    features = (32, 64) if whole else (64, 256) if entry.head_dim > 64 else (256,)
    if entry.direction == "dscore" and not (whole or half):
        features = (32, *features)
    defer = (False, True) if entry.direction == "forward" and half else (False,)
    on_hopper = entry.key["architecture"] == "sm90" and half
    settle = (False, True) if entry.direction == "dkv" and on_hopper else (False,)
    for choice in itertools.product(rows, columns, (4, 8), stages, features, defer, settle):
        config = TileConfig(*choice)
        if numbers_of_a_thread(entry, config) <= MOST_NUMBERS:
            yield config


def numbers_of_a_thread(entry: Entry, config: TileConfig) -> float:
    """Float32 that it holds at least: sums, and the tiles of scores and of their gradients."""
    tile = config.rows * config.columns
    sums = {
        "forward": config.rows * entry.head_dim,
        "dq": config.rows * entry.head_dim,
        "dkv": 2 * config.columns * entry.head_dim,
        "dscore": tile,
    }
    tiles = tile if entry.direction == "forward" else 2 * tile
    return (sums[entry.direction] + tiles) / (32 * config.warps)


def candidates(entry: Entry) -> list[TileConfig]:
    """Those that the table has now first: the others have to agree with them. Then in any order: time may end it."""
    fits = lambda found: found["head_dim"] >= entry.head_dim and (entry.plain or not found.get("plain"))
    serves = lambda found: fits(found) and {**found, "head_dim": entry.head_dim}.items() >= entry.key.items()
    present = [tile_config.config_of(found) for found in tile_config.table() if serves(found)][:1]
    others = sorted(legal(entry), key=str)
    random.Random(0).shuffle(others)
    return list(dict.fromkeys([*present, *others]))


TINY = [TileConfig(16, 16, warps=4, stages=1), TileConfig(32, 16, warps=4, stages=1)]


# -- timing -----------------------------------------------------------------------------------------------------------


def tune(
    entry: Entry, configs: Sequence[TileConfig], interpret: bool, settings: Sequence[Settings], seconds: float | None
) -> tuple[list[Row], list[Row]]:
    """What became of each, and of the fastest, which are measured once more, the fastest first."""
    arguments = entry.arguments(interpret)
    programs = compile_all(entry, configs, arguments, interpret, seconds)
    expected = functools.cache(lambda: first_result(programs, arguments))

    def candidate(name: str, _: Entry) -> Candidate:
        if programs[name].cancelled():
            raise NotApplicable("there was no time to compile it")
        run = functools.partial(programs[name].result(), *arguments)
        cost = functools.partial(timing.seconds_per_call, run, finish=jax.block_until_ready)
        return Candidate(lambda: [np.asarray(difference(run(), expected()))], cost)

    def measured(names: Sequence[str], settings: Settings) -> list[Row]:
        peers = {name: functools.partial(candidate, name) for name in names}
        unit = float(jnp.finfo(DTYPES[entry.dtype]).eps)
        return measure(
            Case(
                f"{entry.direction} {entry.dtype} H={entry.head_dim}",
                "ms",
                entry,
                peers,
                reference=lambda entry: [np.zeros(())],
                allowed=lambda name, entry: [ROUNDING[entry.dtype] * unit],
            ),
            settings,
        )

    rows = measured(list(programs), settings[0])
    finalists = [row.peer for row in ranked(rows)[:FINALISTS]]
    return rows, ranked(measured(finalists, settings[1]))


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Those measured, the fastest first."""
    return sorted((row for row in rows if row.cost is not None), key=lambda row: row.cost or 0)


def compile_all(
    entry: Entry, configs: Sequence[TileConfig], arguments: Any, interpret: bool, seconds: float | None
) -> dict[str, Future]:
    """In threads; what has not begun after so many seconds is cancelled."""

    def compiled(config: TileConfig) -> Callable[..., Any]:
        run = lambda inputs, saved: KERNELS[entry.direction](inputs, saved, config, interpret)
        return jax.jit(run).lower(*arguments).compile()

    with (
        ThreadPoolExecutor(min(16, environment.usable_cores())) as pool,
        progress_bar(len(configs), f"compiling {entry.direction}", "tiles") as progress,
    ):
        programs = {describe(config): pool.submit(compiled, config) for config in configs}
        for future in programs.values():
            future.add_done_callback(lambda _: progress.update())
        wait(programs.values(), timeout=seconds)
        pool.shutdown(cancel_futures=True)
    return programs


def first_result(programs: dict[str, Future], arguments: Any) -> Any:
    """Of the first that runs."""
    errors = []
    for future in programs.values():
        if not future.cancelled():
            try:
                return jax.block_until_ready(future.result()(*arguments))
            except Exception as error:  # whatever a compiler or a kernel raises; it becomes a row elsewhere
                errors.append(error)
    raise ExceptionGroup("no tiles run", errors)


@jax.jit
def difference(result: Any, expected: Any) -> jax.Array:
    """The largest, as a share of the largest number that is expected."""
    largest = lambda x: jnp.max(jnp.abs(x.astype(jnp.float32)))
    each = jax.tree.map(
        lambda x, y: largest(x.astype(jnp.float32) - y.astype(jnp.float32)) / largest(y), result, expected
    )
    return jnp.max(jnp.stack(jax.tree.leaves(each)))


def describe(config: TileConfig) -> str:
    return " ".join(f"{name}={value}" for name, value in settings_of(config).items())


# -- the table --------------------------------------------------------------------------------------------------------


def settings_of(config: TileConfig) -> dict[str, Any]:
    """Those that are not the default."""
    return {field.name: value for field in fields(config) if (value := getattr(config, field.name)) != field.default}


def write(file: Path, entry: Entry, config: TileConfig, reason: str) -> None:
    """Puts it in the place of its predecessor; all else stays as it is, a line each.

    Without one it comes before the entry for all calls, as the first that fits is taken, or at the end.
    """
    new = {**entry.key, **settings_of(config), **({"plain": True} if entry.plain else {}), "reason": reason}
    entries = json.loads((file if file.exists() else tile_config.TABLE).read_text())["entries"]
    places = [place for place, old in enumerate(entries) if old.items() >= entry.key.items()]
    same = [place for place in places if entries[place].get("plain", False) == entry.plain]
    start = same[0] if same else places[0] if places and entry.plain else len(entries)
    entries[start : start + len(same)] = [new]
    lines = ",\n".join(f"  {json.dumps(each)}" for each in entries)
    file.write_text(f'{{"entries": [\n{lines}\n]}}\n')


def reason_of(entry: Entry, best: Row, rows: Sequence[Row]) -> str:
    assert best.cost is not None
    versions = f"{environment.device_kind()}, jax {jax.__version__}, {environment.today()}"
    rate = f"{figures(entry.flops / best.cost / 1e12)} TFLOP/s"
    return f"fastest of {len(ranked(rows))} at {entry}: {rate}; {versions}"


def report(entry: Entry, rows: Sequence[Row], finalists: Sequence[Row]) -> str:
    """How many of what, with the most frequent reasons, and the best."""
    what = lambda row: ": ".join(filter(None, [row.status, re.sub(r"[\d.]+", "#", row.message)]))
    counts = collections.Counter(map(what, rows))
    lines = [f"{entry.direction} {entry.dtype} head_dim={entry.head_dim} at {entry}"]
    lines += [f"  {count} {status}" for status, count in counts.most_common(FINALISTS)]
    table = [("tiles", "time", "speed")]
    for row in finalists:
        assert row.cost is not None
        table.append((row.peer, f"{figures(1e3 * row.cost)} ms", f"{figures(entry.flops / row.cost / 1e12)} TFLOP/s"))
    return "\n".join([*lines, in_columns(table)])


# -- the command ------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directions", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--seconds", type=float, help="for compiling the tiles of one entry; by default as many as it takes"
    )
    parser.add_argument("--quick", action="store_true", help="two tiny tiles, in interpret mode without a GPU")
    parser.add_argument("--out", type=Path, help=f"the table with its new entries; by default {tile_config.TABLE.name}")
    options = parser.parse_args(arguments)
    if options.quick and options.out is None:
        parser.error("--quick needs --out: its numbers do not belong into the table")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    has_gpu = jax.default_backend() == "gpu"
    if not has_gpu and not options.quick:
        raise SystemExit("There is no GPU here that JAX can use. `--quick --out FILE` shows that everything runs.")
    for direction, dtype, head_dim in itertools.product(options.directions, options.dtypes, options.head_dims):
        entry = Entry(direction, dtype, head_dim)
        configs, settings = candidates(entry), [FIRST, FINAL]
        if options.quick:
            entry, configs, settings = (
                replace(entry, batch=1, length=32, shape=shape_of(1, 1, head_dim)),
                TINY,
                [QUICK, QUICK],
            )
        rows, finalists = tune(entry, configs, not has_gpu, settings, options.seconds)
        print(report(entry, rows, finalists), flush=True)
        if finalists:  # after each: whatever ends this process, what is known stays
            best = next(config for config in configs if describe(config) == finalists[0].peer)
            write(options.out or tile_config.TABLE, entry, best, reason_of(entry, finalists[0], rows))


if __name__ == "__main__":
    main()
