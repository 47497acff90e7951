"""Runs in a process of its own that can compile for GPUs: what a ring of 8 H100 sends, and when."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mqa_jax
from benchmarks.gpu_compile import TARGETS
from mqa_jax.kernels import gpu

DEVICES, TOKENS, N, K, H = 8, 16384, 8, 2, 128
HELD = TOKENS // DEVICES * K * 2 * H  # numbers in keys and values


def compiled(order, **options):
    """The gradients, with the check of varying axes."""
    target = TARGETS["h100"]
    topology = topologies.get_topology_desc(platform="cuda", target_config=target.config(), topology=f"1x1x{DEVICES}")
    mesh = topologies.make_mesh(topology, (DEVICES,), ("s",))
    cut = NamedSharding(mesh, P(None, "s"))
    arrays = [jax.ShapeDtypeStruct((1, TOKENS, heads, H), jnp.bfloat16, sharding=cut) for heads in (N, K, K)]
    attend = functools.partial(mqa_jax.sharded_attention, sequence_axis="s", mesh=mesh, order=order, **options)
    loss = lambda *arrays: jnp.sum(attend(*arrays, is_causal=True, implementation="triton").astype(jnp.float32) ** 2)
    with gpu.assuming(target.architecture):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("cuda",))
        return lowered.compile(compiler_options={"xla_gpu_autotune_level": 0})


def messages_hide_behind_kernels():
    """In the order of the compiled program a kernel runs between the start and the end of each message."""
    for order in ("contiguous", "zigzag"):
        text = compiled(order).as_text()
        assert "is_scheduled=true" in text
        events = re.findall(r" (collective-permute-start|collective-permute-done)\(|__gpu\$xla\.gpu\.triton", text)
        kinds = [kind.removeprefix("collective-permute-") or "kernel" for kind, _ in itertools.groupby(events)]
        for i, kind in enumerate(kinds):
            if kind == "start":
                assert kinds[i + 1 : i + 3] == ["kernel", "done"], (order, kinds)
        starts = re.findall(r"= (\(.*\)) collective-permute-start\(", text)  # XLA may join two into one
        sent = collections.Counter(re.findall(r"\w+\[\d+\]", " ".join(starts)))
        assert sent == {f"bf16[{HELD}]": 2 * 2, f"f32[{HELD}]": 2 * 2}, sent  # twice: what is sent, and what comes
        assert not re.search("all-gather|all-reduce|all-to-all|reduce-scatter", text)
