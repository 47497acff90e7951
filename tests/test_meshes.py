"""Attention on meshes of 8 CPU devices, in processes of their own: their number is set before JAX uses any."""

import own_process
import pytest

PARTS = [
    "a_shared_operand_in_shard_map()",
    "the_same_entries_are_dropped()",
    "what_is_refused()",
    "under_vmap()",
    "scanned_modules()",
]


def run(*parts):
    own_process.run_on_devices("\n".join(["import meshes", *(f"meshes.{part}" for part in parts)]))


def test_parts():
    run(*PARTS)


@pytest.mark.slow
def test_in_shard_map():
    run("in_shard_map()")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_against_one_device(part):
    run(f"against_one_device({part}, 16)")
