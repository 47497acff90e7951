"""Executes the compiled Triton kernels on emulated GPUs, on any CPU: `make emulate ARGS='--gpu h100'`.

Without arguments a table of calls on an A100 and an H100. It says nothing of speed, and "executed in an emulator" is
not "run on a GPU": `ptx_emulator/README.md` says what is modelled.
"""

import argparse
import functools
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import conftest
import jax
from ptx_emulator import emulation


class Order(NamedTuple):
    """One call: the number of it among those of a kind, on a GPU."""

    gpu: str
    kind: str
    number: int


class Outcome(NamedTuple):
    """`wrong` is None, or what was wrong."""

    order: Order
    name: str
    wrong: str | None
    kernels: list[str]
    seconds: float


Judged = list[tuple[str, Callable[[], None]]]  # names of calls, and what judges them within `emulated`


def table(gpu: str) -> Judged:
    import emulated_cases

    judged = lambda case: lambda: case.judge("triton")
    return [(str(case), judged(case)) for case in emulated_cases.cases() if case.runs_on(gpu)]


def pairs(gpu: str) -> Judged:
    """Rows of the tables in which every pair of options occurs, in small tiles."""
    import emulated_cases
    import ways

    def judged(name: str, row: dict) -> Callable[[], None]:
        way = ways.compiled(name)
        return lambda: way.judge(way.results(row), way.expected(row))

    def named(name: str, row: dict) -> str:
        return f"{name}: " + " ".join(f"{key}={x}" for key, x in row.items() if x not in (None, False))

    return [(named(*one), judged(*one)) for one in emulated_cases.pairs()]


def mutants(gpu: str) -> Judged:
    """Kernels with a fault in their source: right is what is noticed."""
    import emulated_mutants

    return [(str(mutant), mutant.judge) for mutant in emulated_mutants.MUTANTS if gpu in mutant.gpus]


def broken(gpu: str) -> Judged:
    """Compiled kernels that lack an instruction: each kind of them has to be noticed somewhere."""
    import broken_ptx

    return [(call, functools.partial(broken_ptx.judge, gpu, call)) for call in broken_ptx.CALLS]


KINDS = {"table": table, "pairs": pairs, "mutants": mutants, "broken": broken}


def run(order: Order) -> Outcome:
    """In a process that is prepared."""
    name, judge = KINDS[order.kind](order.gpu)[order.number]
    start, wrong = time.monotonic(), None
    with emulation.emulated(order.gpu) as emulated:
        try:
            judge()
        except Exception as error:  # the compiler's, the emulator's or the oracle's: it is the result
            wrong = f"{type(error).__name__}: {error}"
    jax.clear_caches()
    return Outcome(order, name, wrong, emulated.names(), time.monotonic() - start)


def prepare() -> None:
    """A process, before it makes an array."""
    os.environ.setdefault("XLA_FLAGS", " ".join(conftest.FAST_TO_COMPILE))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # else a callback waits for ever where there is one core
    logging.getLogger("jax._src.callback").disabled = True  # it prints what a callback raises, which `run` reports
    warnings.simplefilter("ignore")


def outcomes(orders: list[Order], jobs: int) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, prepare) as pool:
        yield from pool.map(run, orders)


def orders_of(gpus: list[str], kinds: list[str], words: list[str], every: int, in_turn: bool) -> list[Order]:
    orders = []
    for turn, gpu in enumerate(gpus):
        for kind in kinds:
            names = [name for name, _ in KINDS[kind](gpu)]
            chosen = range(0, len(names), every if kind == "pairs" else 1)
            chosen = chosen[turn :: len(gpus)] if in_turn else chosen
            orders += [Order(gpu, kind, n) for n in chosen if not words or any(word in names[n] for word in words)]
    return orders


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", choices=emulation.GPUS, default=["a100", "h100"])
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="calls that have one of these in the name"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["table", "pairs"],
        help="mutants: faults in the kernels' source; broken: compiled kernels that lack an instruction",
    )  # fmt: skip
    parser.add_argument("--every", type=int, default=32, help="of the rows with pairs of options run each so-many-th")
    parser.add_argument("--in-turn", action="store_true", help="each call on one of the GPUs, in turn, not on all")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    reason = emulation.missing()
    if reason is not None:
        print(f"NOT RUN: the kernels on emulated GPUs, because {reason}.")
        return 0
    prepare()
    start = time.monotonic()
    found = []
    orders = orders_of(options.gpu, options.kinds, options.only, options.every, options.in_turn)
    for outcome in outcomes(orders, options.jobs):
        found.append(outcome)
        state = "ok" if outcome.wrong is None else "WRONG"
        kernels = " ".join(name.removeprefix("mqa_") for name in outcome.kernels)
        print(f"{outcome.order.gpu}  {state}  {outcome.seconds:.1f} s  {outcome.name}  [{kernels}]", flush=True)
        if outcome.wrong is not None:
            print("    " + outcome.wrong.replace("\n", "\n    "), flush=True)
    for gpu in options.gpu:
        mine = [outcome for outcome in found if outcome.order.gpu == gpu]
        wrong, launches = sum(x.wrong is not None for x in mine), sum(len(x.kernels) for x in mine)
        print(f"{gpu}: {len(mine)} calls, {launches} launches executed, {wrong} calls wrong")
    print(f"{time.monotonic() - start:.0f} s")
    return int(any(outcome.wrong is not None for outcome in found) or not found)


if __name__ == "__main__":
    sys.exit(main())
