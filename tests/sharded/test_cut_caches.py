"""Caches whose positions are cut over 8 CPU devices, in modules, in processes of their own, as in `test_sequences`."""

import own_process
import pytest

MODULE = "from cut_caches import *\n"


def test_some():
    own_process.run_on_devices(MODULE + "the_cache_stays()\nfor way in WAYS[:2]: check(*way, calls=2)")


@pytest.mark.slow
def test_more():
    own_process.run_on_devices(MODULE + "a_cache_that_is_not_cut(); full_caches()\nfor way in WAYS: check(*way)")


@pytest.mark.slow
def test_each_alone():
    own_process.run_on_devices(MODULE + "each_alone()")
