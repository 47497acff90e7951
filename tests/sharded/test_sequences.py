"""Sequences that are cut over 8 CPU devices, in processes of their own: their number is set before JAX uses any."""

import os
import subprocess
import sys

import jax
import own_process
import pytest

from benchmarks import gpu_compile
from benchmarks.gpu_compile import compiler

PROGRAM = """
import os
import conftest
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *conftest.FAST_TO_COMPILE])
import jax.numpy as jnp
import sequences
{calls}
"""


def run(*parts):
    own_process.run(PROGRAM.format(calls="\n".join(f"sequences.{part}" for part in parts)))


def test_some_of_everything():
    run("some_of_everything()", "collectives_are_those_of_the_formula()", "a_window_ends_the_journey()")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_everything(part):
    run(f"everything({part}, 4)")


@pytest.mark.slow
def test_batch_and_heads():
    run("together_with_batch_and_heads()", "in_shard_map()")


def test_decoding():
    run("decoding()")


@pytest.mark.slow
def test_decoding_more():
    run("decoding(2, 5, jnp.bfloat16)", "decoding(3)", "gradients_of_decoding()")


@pytest.mark.slow
def test_precision_and_memory():
    run("in_bfloat16()", "in_8_bits()", "under_transformations()", "memory_is_linear()")


@pytest.mark.slow
@pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing()))
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="compiles for one device without a GPU, not for eight")
def test_messages_hide_behind_kernels():
    environment = compiler.worker_environment()
    paths = os.pathsep.join([environment["PYTHONPATH"], *sys.path])
    program = "import on_gpus; on_gpus.messages_hide_behind_kernels()"
    subprocess.run([sys.executable, "-c", program], env={**environment, "PYTHONPATH": paths}, check=True)
