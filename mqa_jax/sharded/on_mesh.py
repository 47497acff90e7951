"""What each device computes of whole arrays on a mesh, whose sequence is cut: a `jax.shard_map` over all its axes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mqa_jax import axes
from mqa_jax.axes import Cut
from mqa_jax.inputs import Inputs

Found = tuple[Array, Array | None]  # output and log-sum-exp


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # so that a call outside jit is one program
def attend(mesh: Any, cut: Cut, function: Callable[..., Found], settings: tuple, inputs: Inputs) -> Found:
    """`function(names of the mesh axes that cut the keys, *settings, inputs of a device)`."""
    leaves, tree = jax.tree.flatten(inputs)
    letters = axes.of_leaves(inputs)
    # Rows are cut, and their columns are not.
    columns = [x.replace("s", "x") if "t" in x else x for x in letters]
    specs = [cut.spec(axes.expanded(x, leaf.ndim), leaf.shape) for x, leaf in zip(columns, leaves, strict=True)]
    heads = Cut(cut.mesh, tuple(each for each in cut.axes if each[0] == "n"), cut.heads, cut.kv_heads)

    def part(*leaves: Array) -> Found:
        own = [heads.own_kv_head(x, leaf) for x, leaf in zip(letters, leaves, strict=True)]
        return function(cut.names("s"), *settings, heads.local(jax.tree.unflatten(tree, own)))

    rows = P(*(cut.names(x) or None for x in "btn"))
    return over(mesh, part, specs, (rows, rows if inputs.residual else None), leaves)


def over(mesh: Any, part: Callable[..., Any], specs: list[P], out_specs: Any, arrays: list[Array]) -> Any:
    """`part` of the parts of these arrays."""
    run = jax.shard_map(part, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs)
    if AxisType.Explicit in mesh.axis_types:
        arrays = [jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
    return run(*arrays)
