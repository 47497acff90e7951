"""How long a call takes.

Worker threads of torch and of XLA spin for some milliseconds after a call and take a core from whoever runs next. The
first call of a turn bears that, and does not count, unless it takes so long that milliseconds are nothing. Nothing else
is done about it: decoding on 2 cores, a rest of 0.25 s before each turn made torch up to 20% slower and us no faster;
OMP_WAIT_POLICY=passive was within the noise.

On a busy machine torch's threads spin until the last of them has got a core: only quiet machines compare fairly.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
      turns: how often each peer is measured.
      turn_seconds: how long about.
      peer_seconds: a peer that has taken so long, in all its turns, has had enough of them, if they were MIN_TURNS;
        with fewer it has after PATIENCE times as long.
    """

    turns: int = 5
    turn_seconds: float = 0.1
    peer_seconds: float = 1.0


QUICK = Settings(turns=2, turn_seconds=0.0)
MIN_TURNS, PATIENCE = 3, 2
LONG = 0.4  # seconds of a call


def seconds_per_call(
    run: Callable[[], object], least: float, finish: Callable[[object], object] = lambda result: None
) -> float:
    """The mean of as many calls as take `least` seconds, at least one, after a first that counts only if it is long.

    Where a call only starts its work, `finish` waits for that of the last one: meanwhile the calls queue up, and what
    it costs to start them is hidden, as in a program that has something to do.
    """
    first = _seconds(run, 1, finish)
    if first > LONG:
        return first
    calls = max(1, math.ceil(least / first))
    return _seconds(run, calls, finish) / calls


def _seconds(run: Callable[[], object], calls: int, finish: Callable[[object], object]) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run()
    finish(result)
    return time.perf_counter() - start
