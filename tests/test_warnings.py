"""Which warnings fail the tests: all of ours, and of other packages all but what they deprecate of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = """
import warnings

def inside(kind):
    warnings.warn("of its own", kind, stacklevel=1)

def called(kind):
    warnings.warn("of who calls it", kind, stacklevel=2)
"""
TESTS = """
import another_package
import pytest

@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_inside(kind):
    another_package.inside(kind)

@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning, UserWarning])
def test_called(kind):
    another_package.called(kind)

def test_other_kinds():
    another_package.inside(UserWarning)

OURS = "mqa_jax.kernels.flash", "mqa_jax", "benchmarks.run", "sentences", "oracle", "strict_gpu", "ptx_emulator.bits"

@pytest.mark.parametrize("name", OURS)
def test_ours(name):
    import warnings
    warnings.warn_explicit("x", FutureWarning, "x.py", 1, module=name)

@pytest.mark.parametrize("name", ["mqa_jax_extras", "jax.numpy", "transformers.sentences"])
def test_of_similar_names(name):
    import warnings
    warnings.warn_explicit("x", FutureWarning, "x.py", 1, module=name)
"""


@pytest.mark.slow
def test_whose_deprecations_fail_a_test(tmp_path):
    """The settings of this suite, on tests that warn."""
    (tmp_path / "another_package.py").write_text(PACKAGE)
    (tmp_path / "test_that_warns.py").write_text(TESTS)
    settings = [f"--config-file={ROOT / 'pyproject.toml'}", f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(tmp_path), *(str(ROOT / name) for name in ("tests", "examples", "."))])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, "-p", "conftest", "-rA", "-q", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths},
    )
    outcomes: dict[str, set[str]] = {"PASSED": set(), "FAILED": set()}
    for line in done.stdout.splitlines():
        outcome, _, name = line.partition(" ")
        if outcome in outcomes:
            outcomes[outcome].add(name.partition("::")[2].partition("[")[0].partition(" - ")[0])
    assert outcomes["PASSED"] == {"test_inside", "test_of_similar_names"}, done.stdout
    assert outcomes["FAILED"] == {"test_called", "test_other_kinds", "test_ours"}, done.stdout
