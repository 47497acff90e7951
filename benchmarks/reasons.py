"""Why a peer is faster than we are, and what would fix it: one entry for each that the committed results have."""

from fnmatch import fnmatch
from typing import Any, NamedTuple


class Reason(NamedTuple):
    why: str
    fix: str


UNKNOWN = Reason("not known yet", "")
PASSES = (
    "maximum, exponential and sum are passes of their own over a tile of scores, which XLA's CPU backend does not fuse "
    "with a product: at T=4096, 8/1 heads, a loop over the same tiles with nothing but the products took 155 ms of our "
    "208, and the whole of PyTorch 164"
)
WASTE = "tiles that the causal mask cuts are computed whole: three quarters of all pairs at T=512, where half are seen"
OWN_KERNEL = "a compiled kernel behind XLA's foreign function interface, which multiplies and exponentiates in one pass"

# (case, direction, peer), each a pattern of fnmatch; the first that fits is taken.
REASONS: dict[tuple[str, str, str], Reason] = {
    ("MPT-7B", "*", "torch*"): Reason(
        f"{PASSES}; and ALiBi is computed in each tile, where PyTorch is given an array of all of it",
        f"{OWN_KERNEL}; one array of ALiBi's distances for all tiles of the same shape",
    ),
    ("length-4096", "forward*", "torch*"): Reason(PASSES, OWN_KERNEL),
    ("*", "forward*", "torch*"): Reason(f"{PASSES}; {WASTE}", OWN_KERNEL),
    ("Falcon-7B-decode", "forward", "*"): Reason(
        "none that is no noise: with one key/value head and 71 rows both multiply the same matrices", "nothing"
    ),
}


def reason_for(row: dict[str, Any]) -> Reason | None:
    names = (row["case"], row["direction"], row["peer"])
    fits = lambda patterns: all(fnmatch(name, pattern) for name, pattern in zip(names, patterns))
    return next((reason for patterns, reason in REASONS.items() if fits(patterns)), None)
