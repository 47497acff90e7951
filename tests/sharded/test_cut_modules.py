"""Modules with a `sequence_axis` on 8 CPU devices, in processes of their own, as in `test_sequences`."""

import own_process
import pytest

PROGRAM = """
import os
import conftest
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", *conftest.FAST_TO_COMPILE])
from cut_modules import *
{calls}
"""


def test_some():
    own_process.run(PROGRAM.format(calls="parameters()\nfor way in WAYS[:2]: check(*way)"))


@pytest.mark.slow
def test_more():
    own_process.run(PROGRAM.format(calls="nothing_else_is_sent()\nfor way in WAYS[2:]: check(*way)"))
