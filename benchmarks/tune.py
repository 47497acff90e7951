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
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment, timing
from benchmarks.candidate import Candidate, NotApplicable
from benchmarks.cases import Case
from benchmarks.measure import Row, measure
from benchmarks.model_shapes import shape_of
from benchmarks.progress import progress_bar
from benchmarks.table import figures, in_columns
from benchmarks.tile_space import DTYPES, KERNELS, MODELS, TINY, Entry, candidates
from benchmarks.timing import QUICK, Settings
from mqa_jax.kernels.triton import tile_config
from mqa_jax.kernels.triton.tile_config import TileConfig

# Units in the last place of the largest number, by which results may differ. Those of tf32 are 2^13 of float32.
ROUNDING = {"16-bit": 2, "float32": 64, "tf32": 2 << 13, "tf32x3": 256}
FIRST, FINAL = Settings(turns=1, turn_seconds=0.02), Settings(turns=7, turn_seconds=0.05)
FINALISTS = 5


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
