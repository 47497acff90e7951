"""A command's options, also those that are fields of its settings, and errors of them: one sentence, exit status 2."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import Field, field
from typing import Any, NoReturn

EXPECTED = ValueError, NotImplementedError, OSError, ImportError


def option(default: Any, meaning: str) -> Any:
    """A field of settings that is also a command-line option."""
    return field(default=default, metadata={"help": meaning})


class Parser(argparse.ArgumentParser):
    """A parser with a docstring as description, whose errors do not print the usage; --help has all options."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_settings(self, settings: Sequence[Field]) -> None:
        """An option for each of these fields."""
        for setting in settings:
            flag = "--" + setting.name.replace("_", "-")
            kind: Any = dict(action="store_true") if setting.type is bool else dict(type=setting.type)
            self.add_argument(flag, default=setting.default, help=setting.metadata["help"], **kind)

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
