"""A fault: a change of the text of one function under `mqa_jax.kernels`, in the package while something is traced."""

import contextlib
import importlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any, NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
      function: its module and name.
      old, new: text of its source, which must occur once, and what takes its place.
      way: in `ways.WAYS`; or the test that notices, as module.function.
      given: options of the rows of the way's table that notice; of these the ones with the fewest others are run.
    """

    function: str
    old: str
    new: str
    way: str
    given: tuple[str, ...] = ()


@contextlib.contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The package with the fault in it, for whatever is traced meanwhile."""
    owner, name = _owner(mutant.function)
    found = inspect.getattr_static(owner, name)
    function = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", found))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutant.old) == 1, f"{mutant.function} has {mutant.old!r} {source.count(mutant.old)} times"
    module_code = compile(source.replace(mutant.old, mutant.new), f"<{mutant.function}>", "exec")
    (code,) = (x for x in module_code.co_consts if isinstance(x, types.CodeType) and x.co_name == name)
    right, function.__code__ = function.__code__, code  # for modules, too, that have imported the function by name
    try:
        yield
    finally:
        function.__code__ = right


def _owner(function: str) -> tuple[Any, str]:
    """The module or class that a function belongs to, and its name there."""
    *path, name = function.split(".")
    owner: Any = importlib.import_module("mqa_jax.kernels")
    for each in path:
        found = getattr(owner, each, None)
        owner = importlib.import_module(f"{owner.__name__}.{each}") if found is None else found
    return owner, name
