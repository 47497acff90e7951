"""Settings for the whole suite. Strict where JAX is lenient; fast to compile rather than fast to run."""

import collections
import functools
import gc
import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import jax
import jaxlib
import pytest

ROOT = Path(__file__).parents[1]
# `benchmarks` lies here. pytest finds it through pyproject.toml, `python tests/emulate.py` through this line.
sys.path.append(str(ROOT))

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Tests compile thousands of small programs once each. Nothing here changes what a program computes.
FAST_TO_COMPILE = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jaxlib.__version__.startswith("0.10."):  # later ones have no such flag any more, and end the process
    FAST_TO_COMPILE.append("--xla_cpu_use_fusion_emitters=false")

hypothesis.settings.register_profile(
    "suite",
    deadline=None,  # the first call of a shape compiles
    derandomize=True,  # CI must not fail by chance
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,  # `skin`, which stays the same for all examples
    ],
)
hypothesis.settings.load_profile("suite")


# As warnings name them. Files are modules by themselves, unless their folder is a package.
FOLDERS = [ROOT / "examples", ROOT / "tests", *(ROOT / "tests").glob("*/")]
FILES = {path.stem for folder in FOLDERS if not (folder / "__init__.py").exists() for path in folder.glob("*.py")}
NAMES = "|".join(["mqa_jax", "benchmarks", "ptx_emulator", "__main__", r"test_\w+", *sorted(FILES)])
OUR_MODULES = rf"({NAMES})(\.|$)"


LEFT_OUT = pytest.StashKey[list[str]]()  # by `-m` or `-k`


def pytest_deselected(items):
    if items:
        items[0].config.stash.setdefault(LEFT_OUT, []).extend(item.nodeid for item in items)


def pytest_sessionfinish(session):
    """From a worker of pytest-xdist to the process that writes the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left out"] = session.config.stash.get(LEFT_OUT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", [])  # all workers collect the same


def pytest_terminal_summary(terminalreporter, config):
    """Names every test that did not run, with its reason: a skip that nobody counts is a hole."""
    left_out = config.stash.get(LEFT_OUT, [])
    if left_out:
        terminalreporter.section(f"{len(left_out)} tests not selected (`make test-all` runs all)")
        for name, cases in collections.Counter(name.partition("[")[0] for name in left_out).items():
            terminalreporter.write_line(f"{cases:5d} of {name}")
    skipped = terminalreporter.getreports("skipped")
    reasons: dict[str, list[str]] = {}
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    terminalreporter.section(f"{len(skipped)} tests not run")
    for reason, names in sorted(reasons.items()):
        terminalreporter.write_line(f"{len(names)} because {reason}:")
        for name in sorted(names):
            terminalreporter.write_line(f"    {name}")


def pytest_runtest_setup(item):
    """Tests marked `torch` import it themselves, so that each of them is counted where it is not there."""
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("the extra `torch` is not installed")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the Triton kernels on a GPU, and no test without them")
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run every nth case of each test alone")


def pytest_configure(config):
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"error::{kind}:{OUR_MODULES}")
    if not config.getoption("--gpu"):
        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("XLA_FLAGS", " ".join(FAST_TO_COMPILE))  # read when the first array is made
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads, waiting for work, keep a core from XLA's


def pytest_collection_finish():
    look_for_garbage_rarely()


def look_for_garbage_rarely():
    """Each test traces programs, of which little is garbage: looking for it took a tenth.

    Without `gc.freeze`: Hypothesis would not find what refers to its random numbers, and warns of it in some test.
    """
    gc.set_threshold(100_000, 20, 20)


@pytest.hookimpl(trylast=True)  # of what `-m` and `-k` choose
def pytest_collection_modifyitems(config, items):
    """With --one-in every nth case of each test is chosen.

    On a GPU only what tells something about kernels; elsewhere what needs one is skipped, counted and named.
    """
    one_in = config.getoption("--one-in")
    cases: collections.Counter[str] = collections.Counter()
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        name = item.nodeid.partition("[")[0]
        (left_out if cases[name] % one_in and "one_in" not in item.fixturenames else chosen).append(item)
        cases[name] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = chosen
    if config.getoption("--gpu"):
        chosen = [item for item in items if "kernels" in item.fixturenames or item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip("a GPU and the option --gpu are wanted"))


@pytest.fixture
def one_in(request):
    """For tests that leave out cases by themselves, since one process runs many."""
    return request.config.getoption("--one-in")


def pytest_generate_tests(metafunc):
    """Tests of modules run with those of linen and of NNX; those marked `linen` are about what linen alone has."""
    if "skin" in metafunc.fixturenames:
        import skins

        names = [name for name in getattr(metafunc.module, "SKINS", skins.SKINS) if name in skins.SKINS]
        alone = metafunc.definition.get_closest_marker("linen")
        metafunc.parametrize("skin", ["linen"] if alone else names, indirect=True)


@pytest.fixture
def skin(request, monkeypatch):
    """Which API's modules `mqa_jax.GroupedQueryAttention` and its kin are."""
    import skins

    skins.put_on(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["graph", "tree"])
def mode(request):
    """Which of its two modes `flax.nnx` is in."""
    import skins

    with skins.mode(tree=request.param == "tree"):
        yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """Torch's threads wait for each other by spinning; benchmarks that run side by side would wait long."""
    from benchmarks import environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "usable_cores", lambda: 1)
        yield


@pytest.fixture
def kernels(monkeypatch, request):
    """The Triton kernels as the implementation "kernels": in interpret mode, or with --gpu compiled, on the GPU."""
    from mqa_jax import attention  # not before jaxtyping has hooked into the import of the kernels
    from mqa_jax.kernels import platforms
    from mqa_jax.kernels.triton import implementation as triton

    interpret = not request.config.getoption("--gpu")
    forward = functools.partial(triton.forward, interpret=interpret)
    backward = functools.partial(triton.backward, interpret=interpret)
    tangent = functools.partial(triton.tangent, interpret=interpret)
    way = attention.Implementation(platforms.Kernels(forward, backward, tangent), triton.cannot)
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "kernels", way)
