"""The table of what is measured, and against whom."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks import demo
from benchmarks.peers import Attention, Candidate, jax_nn, jax_temporaries, jax_time, ours, torch_time
from benchmarks.peers import reference as attention_reference

Peers = Mapping[str, Callable[[Any], Candidate]]


@dataclass(frozen=True)
class Case:
    """One problem for several peers.

    Attributes:
      unit: what a cost is shown in, a name in `table.UNITS`.
      peers: name -> how to build it from a problem. "ours" comes first; ratios are to it.
      reference: the outputs that are right.
      checked: the problem on which outputs are compared, if not `problem` itself.
      allowed: by how much each output of a peer, by name, may differ there; if None, by `measure.TOLERANCE`.
    """

    name: str
    unit: str
    problem: Any
    peers: Peers
    reference: Callable[[Any], list[np.ndarray]] = attention_reference
    checked: Any = None
    allowed: Callable[[str, Any], Sequence[float]] | None = None

    def small(self) -> "Case":
        return replace(self, problem=self.problem.small(), checked=self.checked and self.checked.small())


SPEED: Peers = {
    "ours": functools.partial(jax_time, ours),
    "jax.nn": functools.partial(jax_time, jax_nn),
    "torch": torch_time,
}
DECODE: Peers = {**SPEED, "torch on the same cache layout": functools.partial(torch_time, same_layout=True)}
MEMORY: Peers = {
    "ours": functools.partial(jax_temporaries, ours),
    "jax.nn": functools.partial(jax_temporaries, jax_nn),
}
GENERATION: Peers = {"ours": demo.ours, "transformers generate": demo.transformers_generate}

MQA = Attention(batch=1, queries=4096, keys=4096, heads=8, kv_heads=1, head_dim=64, is_causal=True)
TRAINING = replace(MQA, gradients=True)
LONG = replace(TRAINING, queries=16384, keys=16384)
STEP = Attention(batch=8, queries=1, keys=4096, heads=16, kv_heads=16, head_dim=64)

CASES = (
    Case("forward", "ms", MQA, SPEED),
    Case("forward+backward", "ms", TRAINING, SPEED),
    Case("decode-mqa", "ms", replace(STEP, kv_heads=1), DECODE),
    Case("decode-gqa", "ms", replace(STEP, kv_heads=4), DECODE),
    Case("decode-mha", "ms", STEP, DECODE),
    Case("memory", "MiB", LONG, MEMORY, checked=LONG.small()),
    Case("demo", "tokens/s", demo.Text(), GENERATION, demo.reference),
)
