"""Modules with a `sequence_axis` on 8 CPU devices, in processes of their own, as in `test_sequences`."""

import own_process
import pytest

MODULE = "from cut_modules import *\n"


def test_some():
    own_process.run_on_devices(MODULE + "parameters()\nfor way in WAYS[:2]: check(*way)")


@pytest.mark.slow
def test_more():
    own_process.run_on_devices(MODULE + "nothing_else_is_sent()\nfor way in WAYS[2:]: check(*way)")
