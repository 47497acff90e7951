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
        """griffe knows the section `Examples:`."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)


def source_of(function: Any) -> ast.FunctionDef | None:
    """None where Python or a library wrote the function, such as the constructor of a dataclass."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, SyntaxError, TypeError):
        return None
    return definition if isinstance(definition, ast.FunctionDef) else None
