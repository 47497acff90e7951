"""Why a peer is faster than we are, and what would fix it: one entry for each that the committed results have."""

from fnmatch import fnmatch
from typing import Any, NamedTuple


class Reason(NamedTuple):
    why: str
    fix: str


UNKNOWN = Reason("not known yet", "")
PRODUCTS = (
    "products as small as a tile's are slower in XLA than in PyTorch's MKL: of 512 x 64 by 64 x 512 float32 numbers "
    "52 and 108 GFLOP/s on two cores, of 512 x 512 by 512 x 64 37 and 114"
)
OWN_KERNEL = "a compiled kernel behind XLA's foreign function interface, which multiplies and exponentiates in one pass"

# (case, direction, peer), each a pattern of fnmatch; the first that fits is taken.
REASONS: dict[tuple[str, str, str], Reason] = {
    ("MPT-7B", "*", "torch*"): Reason(
        f"{PRODUCTS}; and ALiBi is computed in each tile, where PyTorch is given an array of all of it",
        f"{OWN_KERNEL}; one array of ALiBi's distances for all tiles of the same shape",
    ),
    ("documents", "*", "torch flex"): Reason(
        "a document has 256 tokens, and our tiles 512 rows: they compute 4 times the pairs in sight; blocks of 128 "
        "rows and keys compute 1.5 times as many",
        "fewer rows in a tile where documents are short; that they are is known only when the program runs",
    ),
    ("*", "forward*", "torch*"): Reason(PRODUCTS, OWN_KERNEL),
}


def reason_for(row: dict[str, Any]) -> Reason | None:
    names = (row["case"], row["direction"], row["peer"])
    fits = lambda patterns: all(fnmatch(name, pattern) for name, pattern in zip(names, patterns))
    return next((reason for patterns, reason in REASONS.items() if fits(patterns)), None)
