"""The package itself: what importing it loads, what it offers, what its documentation claims."""

import doctest
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jaxtyping
import pytest
import setuptools
from skins import needs_modes

import mqa_jax

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "Attention",
    "FlashAttention",
    "FlashMHA",
    "GroupedQueryAttention",
    "LinearScaling",
    "Llama3Scaling",
    "MultiHeadAttention",
    "MultiQueryAttention",
    "Rope",
    "SequenceAxis",
    "TableScaling",
    "TemperatureTuning",
    "YarnScaling",
    "alibi_slopes",
    "append_to_part",
    "attention_fn",
    "cache_bytes",
    "check_cache",
    "decode_attention",
    "dequantize",
    "dot_product_attention",
    "init_cache",
    "merge_partials",
    "partition_specs",
    "quantize",
    "reorder_cache",
    "reset_cache",
    "ring_attention",
    "sharded_attention",
    "unzigzag",
    "zigzag",
    "zigzag_positions",
}
# Packages of the extras. What imports them slows everybody's start, and fails where they are not installed.
NOT_LOADED = {"torch", "transformers", "optax", "orbax", "tokenizers", "gguf", "safetensors", "chex", "pytest", "tqdm"}


def _loaded_by(code: str) -> set[str]:
    """Which of these packages a fresh interpreter holds after running the code."""
    report = f"import sys\n{code}\nprint(*(set({sorted(NOT_LOADED)}) & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_loads_none_of_the_extras():
    """Apart from those that Flax itself loads."""
    assert _loaded_by("import mqa_jax, mqa_jax.torch_interop") <= _loaded_by("import flax.linen")
    assert "torch" not in _loaded_by("import mqa_jax, mqa_jax.torch_interop")


def test_the_test_above_can_fail():
    assert _loaded_by("import mqa_jax, tqdm") - _loaded_by("import flax.linen") == {"tqdm"}


CALLS = """
import sys
import tomllib
import jax
import jax.numpy as jnp
import mqa_jax

query, key = jnp.ones((1, 3, 4, 8)), jnp.ones((1, 5, 2, 8))
attend = lambda query, **chosen: mqa_jax.dot_product_attention(query, key, key, is_causal=True, **chosen)
loss = lambda query, **chosen: attend(query, **chosen).sum()
"""


def _printed_by(code: str) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout


def test_pallas_is_imported_when_a_kernel_is_traced():
    """By no import, and by no call on a machine without an NVIDIA GPU, unless it asks for "triton"."""
    code = """
loaded = lambda: [name for name in sys.modules if "experimental.pallas" in name or "triton.forward" in name]
assert not loaded()
jax.grad(loss)(query)
module = mqa_jax.MultiQueryAttention(16, 4, attn_impl="triton")
module.init(jax.random.key(0), jnp.ones((2, 5, 16)))
assert not loaded(), loaded()
jax.eval_shape(lambda query: attend(query, implementation="triton"), query)
assert "jax.experimental.pallas.triton" in loaded()
"""
    _printed_by(CALLS + code)


@pytest.mark.parametrize("hidden", ["jax.experimental.pallas", "jax.experimental.pallas.triton"])
def test_a_jax_without_pallas_triton(hidden):
    """Everything else computes; None takes plain XLA, also for a GPU, and "triton" says why it does not."""
    hide = f"import sys; sys.modules[{hidden!r}] = None\n"
    code = """
from mqa_jax.kernels import tile_config

jax.grad(loss)(query)
with tile_config.assuming("sm90"):
    text = jax.jit(jax.grad(loss)).trace(query).lower(lowering_platforms=("cuda",)).as_text()
assert "triton" not in text
try:
    attend(query, implementation="triton")
except NotImplementedError as error:
    print(error)
"""
    printed = _printed_by(hide + CALLS + code)
    rule = r"implementation='triton' cannot compute this call: a JAX with Pallas-Triton only \(jax.__version__='\S+': "
    assert re.match(rule + f".*{hidden}.*; use implementation=None", printed), printed


def test_public_names():
    names = {name for name, x in vars(mqa_jax).items() if not name.startswith("_") and not inspect.ismodule(x)}
    assert names == PUBLIC
    for name in names:
        assert getattr(mqa_jax, name).__doc__, name


def test_the_kernels_are_not_a_package_of_their_own(tmp_path):
    code = "import importlib.util, mqa_jax.kernels.xla.implementation; print(importlib.util.find_spec('kernels'))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout.strip() == "None"


FILES = [path for path in (ROOT / "mqa_jax").rglob("*.py") if "kernels" not in path.parts]


def test_only_the_table_knows_the_kernels():
    """Nothing but `attention.py` imports a kernel, so that another one can take its place.

    Attention over a cut sequence has a derivative of its own, for which it calls the passes of the kernel it is given.
    """
    for path in FILES:
        if path != ROOT / "mqa_jax/attention.py":
            a_kernel = r"mqa_jax\.kernels\.(xla|triton)" if "sharded" in path.parts else r"mqa_jax\.kernels"
            assert not re.search(a_kernel, path.read_text()), path


MODULES = ["mqa_jax", *(m.name for m in pkgutil.walk_packages(mqa_jax.__path__, "mqa_jax."))]


NEEDS: dict[str, Any] = {"torch_interop.calls": pytest.mark.torch, "mqa_jax.nnx": needs_modes}


def test_every_module_is_found():
    kernels = [Path("mqa_jax", path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*.py")]
    files = [*(path.relative_to(ROOT) for path in FILES), *kernels]
    assert set(MODULES) == {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=next((NEEDS[x] for x in NEEDS if f"{x}." in f"{name}."), ())) for name in MODULES],
)
def test_examples_in_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_docstrings_name_every_argument_and_setting():
    for name in PUBLIC:
        thing = getattr(mqa_jax, name)
        text = thing.__doc__
        if isinstance(thing, type) and issubclass(thing, mqa_jax.GroupedQueryAttention):
            text += mqa_jax.GroupedQueryAttention.__doc__
        missing = [field for field in _settings(thing) if not re.search(rf"\b{field}\b", text)]
        assert not missing, f"{name}: {missing}"


def _settings(thing):
    fields = getattr(thing, "__dataclass_fields__", {})
    return [field for field in fields if field not in ("parent", "name")]


def test_shapes_of_the_kernels_are_checked_while_tests_run():
    from mqa_jax.kernels.xla import decode

    inputs: Any = None
    with pytest.raises(jaxtyping.TypeCheckError, match="key"):
        decode.plain_scores(inputs, jnp.ones((1, 2, 1, 3, 4)), jnp.ones((1, 7, 2, 5)))


def test_linen_alone_does_not_load_nnx():
    code = "import sys, mqa_jax; print('flax.nnx' in sys.modules, mqa_jax.nnx.init_cache.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "init_cache"]
    with pytest.raises(AttributeError, match="module 'mqa_jax' has no attribute 'linnen'"):
        mqa_jax.linnen  # noqa: B018


def test_versions_agree():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == mqa_jax.__version__
    assert f"## {mqa_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = setuptools.find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    specs: dict[str, Any] = {name: importlib.util.find_spec(name) for name in MODULES}  # some modules import torch
    assert set(found) == {name for name, spec in specs.items() if spec.submodule_search_locations}
