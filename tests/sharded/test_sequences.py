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
import decoding, derivatives, messages, sequences
{calls}
"""


def run(*parts):
    own_process.run(PROGRAM.format(calls="\n".join(parts)))


def test_some_of_everything():
    run(
        "sequences.some_of_everything()",
        "derivatives.some_of_everything()",
        "derivatives.some_second()",
        "messages.collectives_are_those_of_the_formula()",
        "messages.a_window_ends_the_journey()",
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_everything(part):
    run(f"sequences.everything({part}, 4)")


@pytest.mark.slow
def test_batch_and_heads():
    run("sequences.together_with_batch_and_heads()", "sequences.in_shard_map()", "sequences.outside_of_jit()")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["everything", "second", "in_shard_map", "under_transformations", "in_bfloat16"])
def test_derivatives(part):
    run(f"derivatives.{part}()")


def test_decoding():
    run("decoding.steps()")


@pytest.mark.slow
def test_decoding_more():
    run("decoding.steps(2, 5, jnp.bfloat16)", "decoding.steps(3)", "decoding.gradients()")


@pytest.mark.slow
def test_precision_and_memory():
    run(
        "sequences.in_bfloat16()",
        "sequences.in_8_bits()",
        "sequences.under_transformations()",
        "messages.memory_is_linear()",
    )


@pytest.mark.slow
@pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing()))
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="compiles for one device without a GPU, not for eight")
def test_messages_hide_behind_kernels():
    environment = compiler.worker_environment()
    paths = os.pathsep.join([environment["PYTHONPATH"], *sys.path])
    program = "import on_gpus; on_gpus.messages_hide_behind_kernels()"
    subprocess.run([sys.executable, "-c", program], env={**environment, "PYTHONPATH": paths}, check=True)
