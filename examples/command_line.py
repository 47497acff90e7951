"""Errors of a command's arguments: one sentence, exit status 2, no traceback."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

EXPECTED = ValueError, NotImplementedError, OSError, ImportError


class Parser(argparse.ArgumentParser):
    """A parser with a docstring as description, whose errors do not print the usage; --help has all options."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


@contextlib.contextmanager
def exit_with_a_sentence() -> Iterator[None]:
    """For the code that reads and checks, before anything is computed: its errors are errors of the arguments."""
    try:
        yield
    except EXPECTED as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
