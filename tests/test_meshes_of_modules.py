"""Attention modules on meshes of 8 CPU devices, in processes of their own: their number is set before JAX uses any."""

import own_process
import pytest

MODULE = "from meshes_of_modules import *\n"


def test_parts():
    calls = [
        "sent_by_layers()",
        "fewer_key_value_heads_send_nothing_more()",
        "linen_against_one_device(['fewer key/value heads'], ['data'])",
    ]
    own_process.run_on_devices(MODULE + "\n".join(calls))


@pytest.mark.slow
def test_against_one_device():
    own_process.run_on_devices(MODULE + "linen_against_one_device(); nnx_against_one_device(); decoding()")


def test_caches():
    own_process.run_on_devices(MODULE + "caches_on_explicit_axes()")
