"""What 8 H100 send, in programs that are compiled for them without a GPU, in a process that is set up for it."""

import os
import subprocess
import sys

import jax
import pytest

from benchmarks import gpu_compile
from benchmarks.gpu_compile import compiler


@pytest.mark.slow
@pytest.mark.skipif(gpu_compile.missing() is not None, reason=str(gpu_compile.missing()))
@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="compiles for one device without a GPU, not for eight")
def test_what_is_sent(one_in):
    environment = compiler.worker_environment()
    paths = os.pathsep.join([environment["PYTHONPATH"], *sys.path])
    program = f"import on_gpus; on_gpus.sums_are_those_of_the_formula({one_in}); on_gpus.messages_hide_behind_kernels()"
    subprocess.run([sys.executable, "-c", program], env={**environment, "PYTHONPATH": paths}, check=True)
