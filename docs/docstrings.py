"""How the API pages read this library: an extension of griffe, which mkdocstrings loads."""

import ast
import inspect
import re
import textwrap
from typing import Any

import griffe


class AsWritten(griffe.Extension):
    """Objects are inspected, since some docstrings are made when a class is; annotations are read from the source.

    An evaluated `ArrayLike` is a union of eight types.
    """

    def on_function_instance(self, *, node: Any, func: griffe.Function, **_: Any) -> None:
        definition = source_of(getattr(node, "obj", None))
        if definition is None:
            return
        written = definition.args
        for argument in (*written.posonlyargs, *written.args, *written.kwonlyargs):
            if argument.annotation is not None and argument.arg in func.parameters:
                func.parameters[argument.arg].annotation = ast.unparse(argument.annotation)
        if definition.returns is not None:
            func.returns = ast.unparse(definition.returns)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_griffes_words(obj.docstring.value)


def in_griffes_words(docstring: str) -> str:
    """Sections that griffe does not know, or of which it takes a colon for the end of a type, as plain Markdown."""
    docstring = re.sub(r"^Example:$", "Examples:", docstring, flags=re.MULTILINE)
    docstring = re.sub(r"^Returns:\n((?:  .*\n?|\n)+)", _paragraph, docstring, flags=re.MULTILINE)
    docstring = re.sub(r"^Implementations:\n((?:  .*\n?|\n)+)", _bullets, docstring, flags=re.MULTILINE)
    # One entry for several attributes: after a space griffe expects a type.
    several = r"(?<=^  )(?:\w+, )+\w+(?=: )"
    return re.sub(several, lambda names: names[0].replace(", ", ",\u00a0"), docstring, flags=re.MULTILINE)


def _paragraph(section: re.Match[str]) -> str:
    return f"**Returns:**\n\n{textwrap.dedent(section[1])}\n"


def _bullets(section: re.Match[str]) -> str:
    items = re.sub(r"^(?=\S)", "- ", textwrap.dedent(section[1]), flags=re.MULTILINE)
    return f"**Implementations:**\n\n{items}\n"


def source_of(function: Any) -> ast.FunctionDef | None:
    """None where Python or a library wrote the function, such as the constructor of a dataclass."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, SyntaxError, TypeError):
        return None
    return definition if isinstance(definition, ast.FunctionDef) else None
