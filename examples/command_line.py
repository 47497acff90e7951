"""How a command says that it was called wrongly: in a sentence, with exit status 2, and without a traceback."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

EXPECTED = ValueError, NotImplementedError, OSError, ImportError


class Parser(argparse.ArgumentParser):
    """With a docstring for its description, and without a list of all options after each mistake; --help has them."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


@contextlib.contextmanager
def exit_with_a_sentence() -> Iterator[None]:
    """Around what reads and checks, before anything is computed: an error in there is about what was asked for."""
    try:
        yield
    except EXPECTED as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
