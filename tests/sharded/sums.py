"""Runs in a process of its own with 8 devices, or compilers for them: what attention to whole sequences sends.

Nothing in the forward pass; in the backward pass gradients of what devices share are summed over them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from collectives import collectives
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import spec_of

import mqa_jax

B, T, S, N, H = 8, 256, 128, 8, 32
LETTERS = dict(query="btnh", key="bskh", value="bskh", bias="bnts", alibi_slopes="n", sinks="n")
SHARED = dict(bias=(1, 1, 1, S), alibi_slopes=(N,), sinks=(N,))
KEYS = ("key", "value")
MANUAL = "jax.shard_map"
KINDS = AxisType.Auto, AxisType.Explicit, MANUAL


class Case(NamedTuple):
    """How a mesh cuts batch, queries and heads; which gradients are summed, those over the same devices together."""

    mesh: dict[str, int]
    cut: tuple[Any, Any, Any]
    kv_heads: int = 4
    sums: tuple[tuple[str, ...], ...] = ()
    has_shared: bool = False
    kinds: Sequence[Any] = KINDS


CASES = {
    "batch": Case({"b": 8}, ("b", None, None)),
    "heads": Case({"n": 8}, (None, None, "n"), kv_heads=8),
    "batch and heads": Case({"b": 2, "n": 4}, ("b", None, "n")),
    "shared operands": Case(
        {"b": 2, "n": 4}, ("b", None, "n"), sums=(("bias",), ("alibi_slopes", "sinks")), has_shared=True
    ),
    "queries": Case({"t": 8}, (None, "t", None), sums=(KEYS,)),
    "one key/value head": Case({"n": 8}, (None, None, "n"), kv_heads=1, sums=(KEYS,)),
    "fewer key/value heads": Case({"n": 8}, (None, None, "n"), kv_heads=2, sums=(KEYS,), kinds=KINDS[:2]),
}


def size(arrays: dict[str, Any], names: Sequence[str], part: Callable[[Any], tuple[int, ...]]) -> int:
    return sum(math.prod(part(arrays[name])) * arrays[name].dtype.itemsize for name in names)


def formula(case: Case, kind: Any, arrays: dict[str, Any]) -> dict[str, list[int]]:
    """With Auto axes a gradient is summed over the devices that share a head, and then gathered."""
    of_device = lambda x: x.sharding.shard_shape(x.shape)
    if case.kv_heads == 2 and kind == AxisType.Auto:
        one_head = lambda x: (*x.shape[:2], 1, x.shape[3])
        gathered = [size(arrays, [name], of_device) for name in KEYS]
        return {"all-reduce": [size(arrays, KEYS, one_head)], "all-gather": gathered}
    return {"all-reduce": [size(arrays, names, of_device) for names in case.sums]} if case.sums else {}


def check(
    devices: Sequence[Any], dtype: Any, implementation: str, compiled: Callable[..., Any], one_in: int = 1
) -> None:
    """`compiled(function, arrays)`. XLA may join messages. Every `one_in`th case, as with the option of the tests."""
    every = [(name, case, kind) for name, case in CASES.items() for kind in case.kinds]
    for name, case, kind in every[::one_in]:
        types = (AxisType.Auto if kind == MANUAL else kind,) * len(case.mesh)
        mesh = Mesh(np.array(devices).reshape(*case.mesh.values()), tuple(case.mesh), axis_types=types)
        shapes: dict[str, tuple[int, ...]] = dict(query=(B, T, N, H), **dict.fromkeys(KEYS, (B, S, case.kv_heads, H)))
        shapes |= SHARED if case.has_shared else {}
        specs = {each: spec_of(case.cut, LETTERS[each], x, case.kv_heads, mesh) for each, x in shapes.items()}
        arrays = {
            each: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, specs[each]))
            for each, shape in shapes.items()
        }
        attend = functions(implementation, mesh, specs, kind == MANUAL)
        gradients = jax.grad(lambda arrays, attend=attend: jnp.sum(attend(arrays).astype(jnp.float32)))
        message = f"{name}, {kind}"
        if kind == AxisType.Auto and KEYS in case.sums:  # elsewhere what follows says so
            assert collectives(compiled(attend, arrays)) == {}, message
        found, expected = collectives(compiled(gradients, arrays)), formula(case, kind, arrays)
        total = lambda sent: {operation: sum(sizes) for operation, sizes in sent.items()}
        assert total(found) == total(expected), f"{message}: {found}, {expected}"
        assert all(len(found[each]) <= len(expected[each]) for each in expected), f"{message}: {found}"


def functions(implementation: str, mesh: Mesh, specs: dict[str, P], is_manual: bool) -> Callable[..., Any]:
    attend = lambda arrays: mqa_jax.dot_product_attention(**arrays, is_causal=True, implementation=implementation)
    return jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=specs["query"]) if is_manual else attend


def on_cpu(one_in: int = 1) -> None:
    compiled = lambda function, arrays: jax.jit(function).lower(arrays).compile()
    check(jax.devices()[:8], jnp.float32, "xla", compiled, one_in)
