"""What the devices of a mesh send each other, as the text of a compiled program has it."""

import math
import re
from typing import Any

BYTES = {"pred": 1, "s8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
NAMES = "all-gather", "all-reduce", "collective-permute", "all-to-all", "reduce-scatter"


def collectives(compiled: Any) -> dict[str, list[int]]:
    """Of each kind, the bytes of the results of each operation, sorted: once for all turns of a loop."""
    found: dict[str, list[int]] = {}
    for results, name in re.findall(rf"= (\S+|\([^()]*\)) ({'|'.join(NAMES)})(?:-done)?\(", compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"{.*?}", "", results))
        size = sum(BYTES[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in arrays)
        found.setdefault(name, []).append(size)
    return {name: sorted(sizes) for name, sizes in found.items()}
