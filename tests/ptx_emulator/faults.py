"""What a GPU would not forgive, and where it happened."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

# Codes of single accesses, small numbers for the loops over bytes.
OUTSIDE, MISALIGNED, READ_ONLY, UNWRITTEN, REWRITTEN, RACE, IN_FLIGHT, IN_USE, UNFENCED = range(1, 10)
MEANINGS = {
    OUTSIDE: "out of bounds",
    MISALIGNED: "misaligned",
    READ_ONLY: "an input is overwritten",
    UNWRITTEN: "read before it is written",
    REWRITTEN: "written twice",
    RACE: "race",
    IN_FLIGHT: "touched before a copy has arrived",
    IN_USE: "overwritten before a wgmma has read it",
    UNFENCED: "read by a wgmma without a fence after the write",
}
MISSING = "output not written"
Report = Callable[[np.ndarray, np.ndarray], None]  # codes, 0 where nothing is wrong, and places


@dataclass
class Fault:
    """`first` says where it happened first, `count` how often."""

    kind: str
    instruction: str
    first: str
    count: int = 0

    def __str__(self) -> str:
        return f"{self.kind} ({self.count}x) in {self.instruction}; first: {self.first}"


@dataclass
class Faults:
    """One of each kind for an instruction."""

    found: dict[tuple[str, str], Fault] = field(default_factory=dict)

    def add(self, kind: str, instruction: str, first: str, count: int = 1) -> None:
        fault = self.found.setdefault((kind, instruction), Fault(kind, instruction, first))
        fault.count += count

    def kinds(self) -> set[str]:
        return {kind for kind, _ in self.found}

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.found.values())
