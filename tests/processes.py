"""One of several processes with devices of its own: attention modules on a mesh of all of them against one device."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mqa_jax

DEVICES = 2  # of each process

MODULE: Any = mqa_jax.GroupedQueryAttention(16, 4, kv_heads=2, attn_pdrop=0.2)


def loss(params, x):
    out, _, _ = MODULE.apply({"params": params}, x, deterministic=False, rngs={"dropout": jax.random.key(2)})
    return jnp.sum(jnp.sin(out)), out


compute: Any = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def compare(mesh: Any, inputs: Any, expected: Any) -> None:
    """A module that is cut over batch and heads; each process looks at what its devices hold of the results."""
    specs = mqa_jax.partition_specs(inputs[0], heads="model", kv_heads="model", embed="data"), P("data")
    place = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
    with jax.set_mesh(mesh):
        actual = compute(*jax.tree.map(place, inputs, specs))
    for whole, x in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert len(x.addressable_shards) == DEVICES
        for shard in x.addressable_shards:
            np.testing.assert_allclose(np.asarray(shard.data), whole[shard.index], rtol=1e-4, atol=2e-5)


def main(coordinator: str, processes: str, process: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(coordinator, int(processes), int(process), initialization_timeout=60)
    assert jax.device_count() == DEVICES * int(processes)
    x = jax.random.normal(jax.random.key(0), (4, 6, 16))
    inputs = MODULE.init(jax.random.key(1), x, deterministic=True)["params"], x
    expected = jax.tree.map(np.asarray, compute(*inputs))
    for kind, names in [(AxisType.Auto, ("data", "model")), (AxisType.Explicit, ("model", "data"))]:
        # Devices of one process are neighbours along the second axis: the first one crosses processes.
        mesh = jax.make_mesh((int(processes), DEVICES), names, axis_types=(kind,) * 2)
        compare(mesh, jax.tree.map(np.asarray, inputs), expected)
    jax.distributed.shutdown()
    print(f"process {process} agrees")


if __name__ == "__main__":
    main(*sys.argv[1:])
