"""How a command says that it was called wrongly: in a sentence, with exit status 2, and without a traceback."""

import contextlib
import sys
from collections.abc import Iterator

EXPECTED = ValueError, NotImplementedError, OSError, ImportError


@contextlib.contextmanager
def exit_with_a_sentence() -> Iterator[None]:
    """Around what reads and checks, before anything is computed: an error in there is about what was asked for."""
    try:
        yield
    except EXPECTED as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
