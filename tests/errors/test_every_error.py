"""No error is missing from the tables: the message of each is checked, for the rule, the values and the remedy."""

import ast
import functools
import re
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnx_errors
import odd_layers
import pytest
import sharded_errors as sharded
import test_cache_errors as caches
import test_function_errors as function
import test_hf_configs
import test_hf_files
import test_implementation_errors as implementations
import test_module_errors as modules
import test_pair_function_errors as pair_functions
import test_partition_specs
import test_torch_errors as torch
import test_torch_interop
from skins import needs_modes

import mqa_jax
from mqa_jax.torch_interop.hugging_face import attention as hf_attention


@needs_modes
@pytest.mark.torch
@pytest.mark.slow
def test_no_error_is_missing_from_these_tables():
    """Every `raise` of the package is reached by one of them."""
    package = Path(mqa_jax.__file__).parent
    written = {
        (str(path), node.lineno)
        for path in [*package.rglob("*.py"), *(package / "kernels").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        # Those of commands, of Python's own protocols and of several devices are in their own tests.
        if isinstance(node, ast.Raise)
        and path.name not in ("axes.py", "devices.py")
        and not re.search("SystemExit|AttributeError", ast.unparse(node))
    }
    assert sorted(written - _raised()) == []


def _raised() -> set[tuple[str, int | None]]:
    """Where the tables raise: file and line of each frame."""
    places = set()
    tables: list[dict[str, Any]] = [
        function.FUNCTION,
        modules.MODULES,
        modules.NOT_POSSIBLE,
        caches.CACHE,
        caches.NOT_POSSIBLE,
        torch.TORCH,
        torch.NOT_POSSIBLE,
        implementations.KERNELS,
        implementations.NOT_POSSIBLE,
        nnx_errors.MISTAKES,
        test_partition_specs.WRONG,
        sharded.MISTAKES,
        sharded.NOT_POSSIBLE,
    ]
    on_disk = test_hf_files.WRONG | test_hf_files.NEEDS_TORCH
    calls: list[Callable[[], object]] = [
        *(wrong for table in tables for wrong, _ in table.values()),
        *(functools.partial(_in_a_folder, wrong) for wrong, *_ in on_disk.values()),
        *(functools.partial(hf_attention.attention_of, config) for config, *_ in test_hf_configs.FIELDS.values()),
        *(functools.partial(test_torch_interop.from_state, *case) for case in test_torch_interop.WRONG_STATES.values()),
        *(functools.partial(pair_functions.attend, **options) for options, _ in pair_functions.REFUSED.values()),
        *odd_layers.REFUSED,
        *(functools.partial(odd_layers.spoiled, x) for x in odd_layers.ODD),
        functools.partial(nnx_errors.through_the_bridge, tree=True),
        test_torch_interop.on_no_device,
    ]
    for wrong in calls:
        try:
            wrong()
        except (ValueError, NotImplementedError, OSError, ImportError) as error:
            places |= {(str(Path(f.filename)), f.lineno) for f in traceback.extract_tb(error.__traceback__)}
    return places


def _in_a_folder(wrong: Callable[[Path], Any]) -> object:
    with tempfile.TemporaryDirectory() as folder:
        return wrong(Path(folder)).attention(0)
