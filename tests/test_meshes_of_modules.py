"""Attention modules on meshes of 8 CPU devices, in processes of their own: their number is set before JAX uses any."""

import own_process
import pytest

PROGRAM = """
import os
import conftest
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *conftest.FAST_TO_COMPILE])
from meshes_of_modules import *
{calls}
"""


def test_parts():
    calls = [
        "sent_by_layers()",
        "fewer_key_value_heads_send_nothing_more()",
        "linen_against_one_device(['fewer key/value heads'], ['data'])",
    ]
    own_process.run(PROGRAM.format(calls="\n".join(calls)))


@pytest.mark.slow
def test_against_one_device():
    own_process.run(PROGRAM.format(calls="linen_against_one_device(); nnx_against_one_device(); decoding()"))
