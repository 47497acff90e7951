"""The README and the pages of docs/: their code runs and prints what they say, and the files that they name exist."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from skins import needs_modes

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "benchmarks", "docs", "examples", "kernels", "mqa_jax", "requirements", "tests"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_code() -> list[Any]:
    """The pages beyond the first two are slow tests."""
    pages = {page: page.read_text() for page in PAGES if CODE.search(page.read_text())}
    marks = lambda page: [
        *([] if page.name in ("README.md", "index.md") else [pytest.mark.slow]),
        *([pytest.mark.torch] if "import torch" in pages[page] else []),
        *([needs_modes] if "nnx.view" in pages[page] else []),
    ]
    return [pytest.param(page, id=name_of(page), marks=marks(page)) for page in pages]


@pytest.mark.parametrize("page", with_code())
def test_code_runs_and_prints_what_its_comments_say(page):
    """The blocks of a page are one program. What a `print` prints stands behind it, on the same line."""
    blocks = CODE.findall(page.read_text())
    printed = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed), jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(compile(block, name_of(page), "exec"), names)
            if page.name == "README.md" and "equals out[:, 99:]" in block:
                np.testing.assert_allclose(names["token"], names["out"][:, 99:], atol=1e-5)
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", "\n".join(blocks), re.MULTILINE)
    assert printed.getvalue().splitlines() == expected
    assert sum(block.count("print(") for block in blocks) == len(expected)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    """As links, and as code."""
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+\.\w+)`", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_public_name_is_in_the_api_reference():
    import mqa_jax
    import mqa_jax.nnx

    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    for package in (mqa_jax, mqa_jax.nnx):
        source = Path(str(package.__file__)).read_text()
        for name in re.findall(r"^from .* as (\w+)$", source, re.MULTILINE):
            assert f"{package.__name__}.{name}" in documented
