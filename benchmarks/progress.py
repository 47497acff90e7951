"""A bar that shows how far something is, where tqdm is installed."""

import contextlib
from typing import Any

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Unseen:
    """What is called on a bar."""

    def update(self) -> None:
        pass


def progress_bar(total: int, name: str, unit: str) -> contextlib.AbstractContextManager[Any]:
    if tqdm is None:
        return contextlib.nullcontext(Unseen())
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=None)  # None: where nobody looks
