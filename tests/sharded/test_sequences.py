"""Sequences that are cut over 8 CPU devices, in processes of their own: their number is set before JAX uses any."""

import own_process
import pytest

MODULES = "import jax.numpy as jnp", "import decoding, derivatives, messages, sequences, sums"


def run(*parts):
    own_process.run_on_devices("\n".join([*MODULES, *parts]))


def test_some_of_everything(one_in):
    run(
        "sequences.some_of_everything()",
        "derivatives.some_of_everything()",
        "derivatives.some_second()",
        "messages.collectives_are_those_of_the_formula()",
        "messages.a_window_ends_the_journey()",
        f"sums.on_cpu({one_in})",
    )


@pytest.mark.slow
@pytest.mark.parametrize("part", range(16))
def test_everything(part):
    run(f"sequences.everything({part}, 16)")


@pytest.mark.slow
def test_batch_and_heads():
    run("sequences.together_with_batch_and_heads()", "sequences.in_shard_map()", "sequences.outside_of_jit()")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        *(f"everything({part}, 4)" for part in range(4)),
        "second()",
        "in_shard_map()",
        "under_transformations()",
        "in_bfloat16()",
    ],
)
def test_derivatives(part):
    run(f"derivatives.{part}")


@pytest.mark.slow
def test_decoding():
    run("decoding.steps()", "decoding.beyond_the_end()")


@pytest.mark.slow
def test_decoding_more():
    run("decoding.steps(2, 5, jnp.bfloat16)", "decoding.steps(3)", "decoding.gradients()")


@pytest.mark.slow
def test_precision_and_memory(one_in):
    run(
        "sequences.in_bfloat16()",
        "sequences.in_8_bits()",
        "sequences.under_transformations()",
        f"messages.memory_is_linear({one_in})",
    )
