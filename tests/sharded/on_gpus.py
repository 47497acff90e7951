"""Runs in a process of its own that can compile for GPUs: what 8 H100 send, and when."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import sums
from collectives import collectives
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mqa_jax
from benchmarks.gpu_compile import TARGETS
from mqa_jax.kernels import gpu

DEVICES, TOKENS, N, K, H = 8, 16384, 8, 2, 128
HELD = TOKENS // DEVICES * K * 2 * H  # numbers in keys and values
TARGET = TARGETS["h100"]


def topology():
    return topologies.get_topology_desc(platform="cuda", target_config=TARGET.config(), topology=f"1x1x{DEVICES}")


def compiled(function, *arrays):
    with gpu.assuming(TARGET.architecture):
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})


def of_sequences(tokens=TOKENS, heads=(N, K, K), gradient=True, **options):
    """Output or gradients of a sequence, with the check of varying axes."""
    mesh = topologies.make_mesh(topology(), (DEVICES,), ("s",))
    cut = NamedSharding(mesh, P(None, "s"))
    arrays = [jax.ShapeDtypeStruct((1, tokens, each, H), jnp.bfloat16, sharding=cut) for each in heads]
    options = dict(sequence_axis="s", mesh=mesh, is_causal=True, implementation="triton", **options)
    attend = functools.partial(mqa_jax.sharded_attention, **options)
    loss = lambda *arrays: jnp.sum(attend(*arrays).astype(jnp.float32) ** 2)
    return compiled(jax.grad(loss, (0, 1, 2)) if gradient else attend, *arrays)


def sums_are_those_of_the_formula(one_in=1):
    sums.check(topology().devices, jnp.bfloat16, "triton", compiled, one_in)


def messages_hide_behind_kernels():
    """In the order of the compiled program a kernel runs between the start and the end of each message."""
    for order in ("contiguous", "zigzag"):
        program = of_sequences(order=order)
        text = program.as_text()
        assert "is_scheduled=true" in text
        events = re.findall(r" (collective-permute-start|collective-permute-done)\(|__gpu\$xla\.gpu\.triton", text)
        kinds = [kind.removeprefix("collective-permute-") or "kernel" for kind, _ in itertools.groupby(events)]
        for i, kind in enumerate(kinds):
            if kind == "start":
                assert kinds[i + 1 : i + 3] == ["kernel", "done"], (order, kinds)
        sent = collectives(program)
        assert sent.keys() == {"collective-permute"}
        assert sum(sent["collective-permute"]) == 2 * HELD * (2 + 4), sent  # XLA may join two into one
