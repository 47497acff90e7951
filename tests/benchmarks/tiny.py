"""A tiny problem, and some peers that compute it."""

import importlib.util

from benchmarks import judge
from benchmarks.cases import Case, Peers
from benchmarks.measure import Row, measure
from benchmarks.peers import jax_attention, torch_attention
from benchmarks.problems import Problem
from benchmarks.timing import QUICK, Settings

TINY = Problem(batch=1, queries=4, keys=4, heads=2, kv_heads=1, head_dim=4)
HAS_TORCH = importlib.util.find_spec("torch") is not None
SPEED: Peers = {name: jax_attention.peers_for(TINY, "cpu")[name] for name in ("ours", "jax.nn")} | {
    "torch": torch_attention.sdpa
}


def rows_of(peers: Peers, settings: Settings = QUICK) -> list[Row]:
    return measure(Case("tiny", "ms", TINY, peers, judge.exact), settings)


def never(least: float) -> float:
    raise AssertionError("measured although it should not be")
