"""Measures a case: checks every peer, lets them take turns, and gives a row for each, whatever became of it."""

import contextlib
import functools
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.candidate import Candidate, NotApplicable
from benchmarks.cases import Case
from benchmarks.progress import progress_bar
from benchmarks.timing import MIN_TURNS, PATIENCE, Settings

TOLERANCE = 1e-4  # absolute, in float32; a wrong mask or head is off by more than 0.1
LOCATION = re.compile(r"(https?:/)?(?<!\w)(/[^\s/'\"]+)+/")  # all of a path but its last name


@dataclass(frozen=True)
class Row:
    """What became of one peer.

    Attributes:
      batch, length: of the problem, for plots; the length is that of the keys. None where it has none.
      direction: whether gradients are computed, too; "" where that is no question.
      status: "measured", "wrong" (and not measured), "raised", "absent": not installed, or "not applicable".
      cost: median over the turns, in seconds, bytes or seconds a token.
      ratio: median over the turns of the peer's cost / our cost: how many times better we are.
      error: largest absolute difference from the reference; of tokens their numbers differ.
      compile_seconds, temporaries: see `candidate.Candidate`.
    """

    case: str
    problem: str
    batch: int | None
    length: int | None
    unit: str
    peer: str
    direction: str
    status: str
    cost: float | None = None
    ratio: float | None = None
    error: float | None = None
    compile_seconds: float | None = None
    temporaries: int | None = None
    message: str = ""


@dataclass
class Attempt:
    """What one peer did so far."""

    peer: str
    status: str = "measured"
    message: str = ""
    error: float | None = None
    candidate: Candidate | None = None
    costs: list[float] = field(default_factory=list)
    seconds: float = 0.0  # that its turns took

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a peer raises is its result
            self.status, self.message = failure_of(error).values()


def failure_of(error: Exception) -> dict[str, str]:
    """Status and message of a row."""
    if isinstance(error, ImportError):
        return {"status": "absent", "message": _message(error)}
    if isinstance(error, NotApplicable):
        return {"status": "not applicable", "message": str(error)}
    return {"status": "raised", "message": f"{type(error).__name__}: {_message(error)}"}


def measure(case: Case, settings: Settings) -> list[Row]:
    attempts = [Attempt(peer) for peer in case.peers]
    checked = case.checked or case.problem
    with progress_bar(len(attempts) + settings.turns, case.name, "step") as progress:
        reference = functools.cache(lambda: case.reference(checked))
        for attempt in attempts:
            with attempt.noting_failure():
                _check(attempt, case, reference)
            progress.update()
        for _ in range(settings.turns):
            for attempt in attempts:
                _take_turn(attempt, settings)
            progress.update()
    return [_row(case, attempt, attempts[0]) for attempt in attempts]


def _check(attempt: Attempt, case: Case, reference: Callable[[], list[np.ndarray]]) -> None:
    build = case.peers[attempt.peer]
    attempt.candidate = build(case.problem)  # first: for a peer that is absent nothing has to be computed
    checked = build(case.checked) if case.checked else attempt.candidate
    difference = lambda array, right: float(np.max(np.abs(array - right)))
    errors = [difference(array, right) for array, right in zip(checked.outputs(), reference(), strict=True)]
    attempt.error = max(errors) if all(map(math.isfinite, errors)) else None
    allowed = case.allowed(attempt.peer, case.checked or case.problem) if case.allowed else itertools.repeat(TOLERANCE)
    for error, most in zip(errors, allowed):
        if not error <= most:
            message = f"differs by {error:.3g} from the reference, where {most:.3g} is allowed"
            attempt.status, attempt.message = "wrong", message


def _take_turn(attempt: Attempt, settings: Settings) -> None:
    if attempt.status == "measured" and attempt.candidate is not None and not _had_enough(attempt, settings):
        start = time.perf_counter()
        with attempt.noting_failure():
            attempt.costs.append(attempt.candidate.cost(settings.turn_seconds))
        attempt.seconds += time.perf_counter() - start


def _had_enough(attempt: Attempt, settings: Settings) -> bool:
    turns = len(attempt.costs)
    return turns > 0 and attempt.seconds > settings.peer_seconds * (1 if turns >= MIN_TURNS else PATIENCE)


def row_of(case: Case, peer: str, **fields: Any) -> Row:
    """Of a peer of a case, with what is known of it."""
    problem = case.problem
    length = getattr(problem, "keys", getattr(problem, "length", None))
    batch = getattr(problem, "batch", None)
    return Row(case.name, str(problem), batch, length, case.unit, peer, case.direction, **fields)


def _row(case: Case, attempt: Attempt, ours: Attempt) -> Row:
    measured = attempt.status == "measured"
    compared = measured and ours.status == "measured" and attempt is not ours
    candidate = attempt.candidate or NOBODY
    return row_of(
        case,
        attempt.peer,
        status=attempt.status,
        cost=statistics.median(attempt.costs) if measured else None,
        ratio=statistics.median(theirs / our for theirs, our in zip(attempt.costs, ours.costs)) if compared else None,
        error=attempt.error,
        compile_seconds=candidate.compile_seconds,
        temporaries=candidate.temporaries,
        message=attempt.message,
    )


NOBODY = Candidate(list, lambda least: math.nan)


def _message(error: BaseException) -> str:
    """Its first line, without the places of files, which are those of one machine."""
    return LOCATION.sub("", str(error).partition("\n")[0])
