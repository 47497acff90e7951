"""Compiled kernels with one instruction taken out or weakened, each of which the emulator should notice."""

import collections
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import oracle
from emulated_cases import Case, causal, sizes
from ptx_emulator.emulation import Ran, emulated

Change = Callable[[re.Match[str]], str]

KINDS: dict[str, tuple[str, Change]] = {
    "no barrier": (r"bar\.sync\s+0;", lambda found: ";"),
    "one copy more on its way": (
        r"(cp\.async\.wait_group\s+)(\d+);",
        lambda found: f"{found[1]}{int(found[2]) + 1};",
    ),
    "no wait for products": (r"wgmma\.wait_group\.sync\.aligned\s+\d+;", lambda found: ";"),
    "no fence": (r"fence\.proxy\.async[\w:.]*;", lambda found: ";"),
    "no guard of a load": (r"@!?%p\d+\s+(ld\.global)", lambda found: found[1]),
    "no guard of a store": (r"@!?%p\d+\s+(st\.global)", lambda found: found[1]),
    "copies that do not stop": (
        r"(cp\.async\.c[ag]\.[^;]*,\s*(0x\w+),)\s*%r\d+;",
        lambda found: f"{found[1]} {found[2]};",
    ),
}


MAX_FAULTS = 12  # of each kind that `judge` tries in a kernel
CALLS: dict[str, Case] = {
    "causal": Case("causal", "bfloat16", sizes(150, 203, (2, 1), 64), causal),
    "ragged": Case("ragged", "bfloat16", sizes(150, 203, (2, 1), 80), gradients=False),
    "step": Case("step", "bfloat16", sizes(1, 1003, (8, 1), 64), gradients=False),
}


class Broken(NamedTuple):
    """`noticed`: by an error, a fault or other numbers; else an empty text."""

    kernel: str
    kind: str
    line: int
    noticed: str


def broken(ran: Ran, most: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Broken]:
    """So many of each kind, spread over the kernel."""
    for kind in kinds:
        pattern, change = KINDS[kind]
        places = list(re.finditer(pattern, ran.compiled.ptx))
        for found in places[:: max(1, -(-len(places) // most))]:
            text = ran.compiled.ptx
            line = text.count("\n", 0, found.start()) + 1
            text = text[: found.start()] + change(found) + text[found.end() :]
            yield Broken(ran.name, kind, line, _noticed(ran, text))


def _noticed(ran: Ran, text: str) -> str:
    from ptx_emulator import launch  # needs numba
    from ptx_emulator.parser import PtxError

    try:
        results, faults = launch.execute(text, ran.compiled.grid, ran.compiled.shared_bytes, ran.inputs, ran.outputs)
    except PtxError as error:
        return str(error)
    if faults.found:
        return ", ".join(sorted(faults.kinds()))
    differ = any(not np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(results, ran.results))
    return "other numbers" if differ else ""


def judge(gpu: str, call: str) -> None:
    """Prints how many were noticed; raises where no break of a kind was, in any of the kernels of a call."""
    problem, run = CALLS[call].problem(), oracle.results if CALLS[call].gradients else oracle.outputs
    with emulated(gpu, keep=True) as emulation:
        jax.block_until_ready(run(problem.astype(CALLS[call].dtype), "triton"))
    found = [one for ran in emulation.ran for one in broken(ran, MAX_FAULTS)]
    for kind in dict.fromkeys(one.kind for one in found):
        mine = [one for one in found if one.kind == kind]
        unnoticed = [f"{one.kernel} line {one.line}" for one in mine if not one.noticed]
        ways = dict(collections.Counter(one.noticed.partition(":")[0] for one in mine if one.noticed))
        count = f"{len(mine) - len(unnoticed)} of {len(mine)}"
        print(f"{gpu}  {call}  {kind}: {count} noticed, {ways}; not: {unnoticed}")
    kinds = {one.kind for one in found}
    missed = kinds - {one.kind for one in found if one.noticed}
    assert not missed, f"no break of these kinds is noticed: {missed}"
