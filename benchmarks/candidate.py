"""What a peer is, when it is ready to run."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Candidate(NamedTuple):
    """A peer that is ready to run.

    Attributes:
      outputs: what is compared with the reference, before anything is measured.
      cost: one turn of the measurement, given `Settings.turn_seconds`: seconds or bytes, less is better.
      compile_seconds: from the traced program to one that runs; None if the peer does not compile, or does not say.
        On a GPU programs are compiled side by side, which makes each take longer.
      temporaries: bytes at the peak beside arguments and results, `memory_analysis().temp_size_in_bytes` in JAX; None
        if nobody knows.
    """

    outputs: Callable[[], list[np.ndarray]]
    cost: Callable[[float], float]
    compile_seconds: float | None = None
    temporaries: int | None = None


class NotApplicable(Exception):
    """Why a peer has nothing to do with a problem."""
