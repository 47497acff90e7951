"""Runs in a process of its own with 8 CPU devices: what devices that share a sequence send, and the memory it takes."""

import functools
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from collectives import collectives
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sequences import WAYS, H, K, N, mesh_of

import mqa_jax
from mqa_jax.kernels import primitives


def compiled(devices, strategy, order, dtype=jnp.float32, tokens=256, which="gradient", **options):
    """The output alone, and with its tangents, gradients or curvature."""
    mesh = mesh_of(devices)
    shape = lambda heads: jax.ShapeDtypeStruct((1, tokens, heads, H), dtype, sharding=NamedSharding(mesh, P(None, "s")))
    options = dict(sequence_axis="s", mesh=mesh, strategy=strategy, order=order, implementation="xla", **options)
    attend = functools.partial(mqa_jax.sharded_attention, **options)
    loss = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32))
    gradient = jax.grad(loss, argnums=(0, 1, 2))
    functions: dict[str, Any] = {
        "output": attend,
        "tangents": lambda *arrays: jax.jvp(attend, arrays, arrays),
        "gradient": gradient,
        "curvature": lambda *arrays: jax.jvp(gradient, arrays, arrays),
    }
    return jax.jit(functions[which]).lower(shape(N), shape(K), shape(K)).compile()


def collectives_are_those_of_the_formula():
    """M bytes are a device's keys and values, Md their float32 gradients. A message in a loop is there once."""
    for order, devices in [("contiguous", 8), ("zigzag", 4)]:
        size = full = 2 * 256 * K * H // devices * 4
        whole = size * devices // 2

        def sent(strategy, which, order=order, devices=devices):
            return collectives(compiled(devices, strategy, order, which=which, is_causal=True))

        assert sent("ring", "output") == {"collective-permute": [size]}
        assert sent("ring", "tangents") == {"collective-permute": [size, 2 * size]}
        # Forward; keys of the backward pass, their gradients behind them, and the way home.
        assert sent("ring", "gradient") == {"collective-permute": sorted([size, size, full, full])}
        assert sent("all_gather", "output") == {"all-gather": [whole, whole]}
        found = sent("all_gather", "gradient")
        assert found.pop("all-gather") in ([whole] * 2, [whole] * 4)  # the XLA of some versions joins 2 and 2
        assert found == {"reduce-scatter": [full // 2] * 2}


def the_pass_itself(kernels, inputs):
    """Instead of the primitive, which has no steps before it is lowered."""
    out, normalizer = kernels.forward(inputs)
    return out, normalizer.log_sum_exp


def a_window_ends_the_journey():
    """The sends of a ring of 8 devices with 32 tokens each, by how far the window reaches to the left and right."""
    sends = {
        (0, 0): [],  # each its own keys
        (32, 0): [1],  # those of one device before
        (33, 0): [1, 1],
        (0, 5): [-1, 1],  # begins with those of the device after
        (40, 32): [-1, 1, 1, 1],
        (-1, 0): [1] * 7,
        (120, 120): [1] * 7,
    }
    for window, expected in sends.items():
        attend = lambda x, window=window: mqa_jax.sharded_attention(
            x, x, x, sequence_axis="s", mesh=mesh_of(8), local_window_size=window, implementation="xla"
        )
        with mock.patch.object(primitives, "attend", the_pass_itself):
            text = str(jax.make_jaxpr(attend)(jnp.zeros((1, 256, 1, 8))))
        first = re.findall(r"perm=\(\(0, (\d)\)", text)
        turns = [int(n) for n in re.findall(r"length=(\d+)", text)]
        found = [-1] * first.count("7") + [1] * sum(turns)
        assert found == expected, f"{window}: {found}"


def memory_is_linear(one_in=1):
    """Temporary memory of all derivatives of twice as many tokens is twice as much."""
    every = [*zip((*WAYS, *WAYS[1:3]), ["gradient"] * 4 + ["tangents", "curvature"])]
    for (strategy, order), which in every[::one_in]:
        small, large = (
            compiled(4, strategy, order, tokens=tokens, which=which, is_causal=True)
            .memory_analysis()
            .temp_size_in_bytes
            for tokens in (8192, 16384)
        )
        assert large <= 2.1 * small, f"{strategy}, {order}, {which}: {small}, {large}"
