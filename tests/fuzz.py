"""Random problems without end against the reference: `make fuzz ARGS="--minutes 30 --seed 7"`.

A structure (sizes, heads, dtype, and which options are given) is compiled once, and many problems go through it, whose
masks end elsewhere. Each is judged as the tests judge: output, log-sum-exp and every gradient. What fails is printed as
a call that can be pasted into Python, from the folder `tests`.
"""

import argparse
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import conftest
import jax
import numpy as np
import option_space
import oracle
from ptx_emulator import emulation
from tqdm import tqdm
from ways import WAYS, compiled

PROBLEMS, SECONDS = 100, 20  # of each structure, at most
LARGE = "xla, tiles of CPUs", "xla, tiles of accelerators"
DTYPES = "float32", "float32", "bfloat16", "float16"
HEADS = *option_space.HEADS, (8, 1), (6, 3), (7, 1)
FEATURES = *option_space.FEATURES, (16, 16), (64, 64), (80, 80), (40, 24)
BATCHES = *option_space.BATCHES, (3,), (2, 1, 2)
GIVEN = 0.35  # how often an option is
IN_8_BITS = 0.1  # how often keys and values are
BITS = "int8", "float8_e4m3fn"
EMULATED_PROBLEMS = 2  # of each structure: compiling it takes most of the time
# Rounding: of thousands of problems with few numbers, in some the plain computation errs much less than it may. And
# where a query sees a single key it cancels exactly what fused ones compute from an output that has been rounded.
LENIENCE_IN_16_BITS = 2


class Structure(NamedTuple):
    """What is compiled: a way of `ways.WAYS`, a choice for each option, and a dtype."""

    way: str
    row: dict[str, Any]
    dtype: str


def structure(names: list[str], rng: np.random.Generator) -> Structure:
    """Any, of these ways."""
    choose = lambda choices: choices[rng.integers(len(choices))]
    name = choose(names)
    way = WAYS[name]
    row = {option: choose(chosen) for option, chosen in way.structure.items()}
    if name not in LARGE:
        row |= {"heads": choose(HEADS), "features": choose(FEATURES), "batch": choose(BATCHES)}
        if name == "xla":
            kv_heads = row["heads"][1]
            row["tiles"] = *map(int, rng.integers(2, 24, 2)), choose([1, kv_heads]), choose([True, False])
        row["sizes"] = _sizes(row, way.tile(row["tiles"]), rng)
    if rng.random() < IN_8_BITS and row["tiles"] in (way.tiles_in_8_bits or [row["tiles"]]):
        row["bits"] = choose(BITS)
    while True:
        options = way.options | way.leading_past
        given = {
            o: choose(chosen[1:] or chosen) if rng.random() < GIVEN else chosen[0] for o, chosen in options.items()
        }
        dtype = choose(DTYPES)
        # Sums of millions of distances overflow; weights with scales in them are bfloat16 (`weight_dtype`).
        beyond = dtype == "float16" and ((name in LARGE and given["alibi_slopes"]) or "bits" in row)
        if not beyond and not (given["ring"] and given["key_lengths"]):
            return Structure(name, row | given, dtype)


def _sizes(row: dict[str, Any], tile: tuple[int, int], rng: np.random.Generator) -> tuple[int, int]:
    """About as long as what the table has, from one tile on."""
    few = row["sizes"][0] <= 16
    rows = int(rng.integers(1, 5)) if few else int(rng.integers(tile[0], 6 * tile[0] + 1))
    return rows, int(rng.integers(tile[1], 6 * tile[1] + 1))


def judged(of: Structure, numbers: Iterable[int], seed: int) -> Iterator[tuple[int, AssertionError | None]]:
    """Number of each problem, and what is wrong with its results."""
    way, numbers = WAYS[of.way], list(numbers)
    differentiated, first = way.differentiated and "bits" not in of.row, _problem(of, numbers[0], seed)
    with way.registered(of.row["tiles"]) as name:
        compute = oracle.program_for_values(first, name, differentiated)
        compute(first)  # is traced here
    plain = oracle.plain_program_for_values(first, differentiated)
    reference = oracle.program_for_values(first.astype("float32"), "reference", differentiated)
    for number in numbers:
        problem = _problem(of, number, seed)
        results, right = compute(problem), reference(problem.astype("float32"))
        try:
            if of.dtype == "float32":
                oracle.judge_float32(results, right, way.factor)
            else:
                oracle.judge(results, plain(problem), right, LENIENCE_IN_16_BITS)
        except AssertionError as error:
            yield number, error
        else:
            yield number, None


def _problem(of: Structure, number: int, seed: int) -> oracle.Problem:
    problem = option_space.problem(of.row, WAYS[of.way].tile(of.row["tiles"]), number, seed)
    return (oracle.quantized(problem, of.row["bits"]) if "bits" in of.row else problem).astype(of.dtype)


@contextlib.contextmanager
def on(gpu: str | None) -> Iterator[None]:
    """The Triton kernels compiled for this GPU, and executed by the emulator; None: interpreted."""
    if gpu is None:
        yield
        return
    ways = {name: compiled(name) for name in WAYS if name.startswith("triton")}
    bits = BITS[:1] if gpu == "a100" else BITS
    few = mock.patch.multiple(sys.modules[__name__], PROBLEMS=EMULATED_PROBLEMS, BITS=bits)
    with emulation.emulated(gpu), mock.patch.dict(WAYS, ways), few:
        yield


def replay(way: str, row: dict[str, Any], dtype: str, number: int, seed: int, gpu: str | None = None) -> None:
    """Judges one problem again; raises what is wrong with it."""
    with on(gpu):
        for _, error in judged(Structure(way, row, dtype), [number], seed):
            if error is not None:
                raise error


def fuzz(names: list[str], minutes: float, seed: int, gpu: str | None = None) -> tuple[int, list[str]]:
    """How many problems were judged, and the calls that replay those that failed."""
    start, count = time.monotonic(), 0
    failures: list[str] = []
    with tqdm(total=round(60 * minutes), unit="s", bar_format="{l_bar}{bar}| {elapsed} {postfix}") as bar:
        for turn in itertools.count():
            if turn and time.monotonic() - start > 60 * minutes:
                break
            of = structure(names, np.random.default_rng((seed, turn)))
            begun = time.monotonic()
            for number, error in judged(of, range(PROBLEMS), seed + turn):
                count += 1
                if error is not None:
                    words = ", ".join(map(repr, (*of, number, seed + turn, *filter(None, [gpu]))))
                    call = f"import fuzz; fuzz.replay({words})"
                    failures.append(call)
                    bar.write(f"{call}\n    {error}\n")
                if time.monotonic() - begun > SECONDS:
                    break
            jax.clear_caches()  # or the programs of an hour would fill the memory
            bar.set_postfix_str(f"{count} problems in {turn + 1} structures, {len(failures)} failed")
            bar.n = min(bar.total, round(time.monotonic() - start))
            bar.refresh()
    return count, failures


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--implementation", choices=("xla", "kernels", "both"), default="both", help="plain XLA, Triton"
    )
    parser.add_argument(
        "--emulate",
        choices=emulation.GPUS,
        help="Triton's kernels alone, compiled for this GPU and executed on the CPU",
    )
    chosen = parser.parse_args(arguments)
    reason = emulation.missing() if chosen.emulate else None
    if reason is not None:
        parser.error(f"--emulate={chosen.emulate}: {reason}")
    if chosen.emulate:
        chosen.implementation = "kernels"
    beginnings = {"xla": ("xla",), "kernels": ("triton",), "both": ("xla", "triton")}[chosen.implementation]
    names = [name for name in WAYS if name.startswith(beginnings)]
    with on(chosen.emulate):
        count, failures = fuzz(names, chosen.minutes, chosen.seed, chosen.emulate)
    print(f"{count} problems judged with --seed {chosen.seed}, {len(failures)} failed.", *failures, sep="\n")
    return 1 if failures or not count else 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_FLAGS", " ".join(conftest.FAST_TO_COMPILE))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # else a callback waits for ever where there is one core
    sys.exit(main())
