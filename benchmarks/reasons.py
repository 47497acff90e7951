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
ONE_CORE = (
    "XLA multiplies tiles of up to 2**16 scores of 64 features on one core, at 155 to 175 of the 310 GFLOP/s of two "
    "(AVX-512), and larger ones leave the caches"
)
OWN_KERNEL = "a compiled kernel behind XLA's foreign function interface, which multiplies and exponentiates in one pass"

# (case, direction, peer), each a pattern of fnmatch; the first that fits is taken.
REASONS: dict[tuple[str, str, str], Reason] = {
    ("MPT-7B", "*", "torch*"): Reason(
        f"{PASSES}; and ALiBi is computed in each tile, where PyTorch is given an array of all of it",
        f"{OWN_KERNEL}; one array of ALiBi's distances for all tiles of the same shape",
    ),
    ("documents", "*", "torch flex"): Reason(
        "its blocks of 128 fit documents of 256 tokens better than our tiles of 256 rows, which are computed whole",
        "smaller tiles where documents are short, which is known only when the program runs",
    ),
    ("length-4096", "forward*", "torch*"): Reason(PASSES, OWN_KERNEL),
    ("BERT*", "forward*", "torch*"): Reason(f"{PASSES}; {ONE_CORE}", OWN_KERNEL),
    ("GPT-2", "forward*", "torch*"): Reason(f"{PASSES}; {ONE_CORE}", OWN_KERNEL),
    ("awkward-*", "forward*", "torch*"): Reason(f"{PASSES}; {ONE_CORE}", OWN_KERNEL),
    ("*", "forward*", "torch*"): Reason(f"{PASSES}; {WASTE}", OWN_KERNEL),
    ("train-step", "", "flax.linen*"): Reason(
        "noise: attention is a small part of this step, and the run before had 1.14x", "a longer text"
    ),
}


def reason_for(row: dict[str, Any]) -> Reason | None:
    names = (row["case"], row["direction"], row["peer"])
    fits = lambda patterns: all(fnmatch(name, pattern) for name, pattern in zip(names, patterns))
    return next((reason for patterns, reason in REASONS.items() if fits(patterns)), None)
