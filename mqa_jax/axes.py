"""The axes of every array of `Inputs`, in the letters of `mqa_jax.shapes`, and how a mesh of devices cuts them.

Batch rows, queries and heads may be cut over mesh axes; keys and features may not. What a device computes then needs

    - its part of each array: the same rows, queries and heads of all of them,
    - the numbers of its first query (its position) and its first head (dropout, functions of scores and masks),
    - its key/value head, where there are fewer of them than parts,
    - for gradients, their sum over the mesh axes that cut the queries, but not the operand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from mqa_jax import masks
from mqa_jax.inputs import Inputs

WHOLE = "*"  # any number of axes, none of which is cut
QUERY, OUT, NUMBER = "btnh", "btnv", "btn"  # `k` is cut as `n` is: key/value head k serves the heads of its group
LETTERS = {
    "query": QUERY,
    "key": "bskh",
    "value": "bskv",
    "bias": "bnts",
    "alibi_slopes": "n",
    "sinks": "n",
    "key_scale": "bsk",
    "value_scale": "bsk",
    "query_offset": "b",
    "allowed": "bnts",
    "query_lengths": "b",
    "key_lengths": "b",
    "query_segments": "bt",
    "key_segments": "bs",
    "lengths": "b",  # of a ring
    "batch": "b",  # numbers of rows, for dropout
    "seed": "x",
    "first": "x",
    "arrays": WHOLE,  # of functions of scores and masks
    "score_arrays": WHOLE,
}


def of_leaves(inputs: Any) -> list[str]:
    """The letters of each leaf of the inputs, in the order of `jax.tree.leaves`."""
    found = []
    for each in fields(inputs):
        x = getattr(inputs, each.name)
        if each.metadata.get("static") or x is None:
            continue
        found += of_leaves(x) if is_dataclass(x) else [LETTERS[each.name]] * len(jax.tree.leaves(x))
    return found


def check_types(query: Array, key: Array, value: Array) -> None:
    """Checks that `Explicit` mesh axes, which are part of the types of arrays, cut what can be cut."""
    for name, x in dict(query=query, key=key, value=value).items():
        for letter, names in zip(LETTERS[name], cuts_of_type(x), strict=True):
            if names and letter in "hv":
                raise ValueError(
                    f"Batch, queries and heads may be cut over mesh axes, features may not: {name} has the type "
                    f"{jax.typeof(x)}. Use jax.sharding.reshard first."
                )
            if names and letter == "s":
                raise ValueError(
                    f"Keys that are cut along the sequence need mqa_jax.sharded_attention: {name} has the type "
                    f"{jax.typeof(x)}. To gather them, use jax.sharding.reshard first."
                )
    cuts, kv_heads = dict(zip(QUERY, cuts_of_type(query), strict=True)), key.shape[-2]
    devices = math.prod(jax.typeof(query).sharding.mesh.shape[name] for name in cuts["n"])
    if kv_heads % devices and devices % kv_heads:
        raise ValueError(
            "The number of key/value heads and that of the parts of the query heads must divide one another: "
            f"{kv_heads=}, parts={devices}, of mesh axes {cuts['n']}. Cut the heads over fewer devices."
        )


def cuts_of_type(x: Array) -> list[tuple[str, ...]]:
    """The mesh axes of more than one device that cut each axis, as its type says."""
    sharding = jax.typeof(x).sharding
    names = [each if isinstance(each, tuple) else (each,) for each in sharding.spec]
    return [tuple(name for name in each if sharding.mesh.shape.get(name, 1) > 1) for each in names]


def alike(arrays: Sequence[Array]) -> list[Array]:
    """Inside `jax.shard_map`: all vary over the axes over which one of them does, which is transposed to a sum."""
    varying = lambda x: set(jax.typeof(x).manual_axis_type.varying)
    union = set().union(*map(varying, arrays))
    missing = [tuple(sorted(union - varying(x))) for x in arrays]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(arrays, missing)]


def expanded(letters: str, axes: int) -> str:
    """With a letter for each axis."""
    return letters[:-1].ljust(axes, "x") if letters.endswith(WHOLE) else letters


@dataclass(frozen=True)
class Cut:
    """The mesh axes that cut each axis of the queries.

    Attributes:
      mesh: names and sizes of the mesh axes.
      axes: for each letter, names of mesh axes. Axes that `jax.vmap` has added have the letters 0, 1, ...
      heads, kv_heads: N and K of the whole arrays.
    """

    mesh: tuple[tuple[str, int], ...]
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    heads: int
    kv_heads: int

    def names(self, letter: str) -> tuple[str, ...]:
        """The mesh axes that cut this axis."""
        return self._names_of_kv_heads() if letter == "k" else dict(self.axes).get(letter, ())

    def _names_of_kv_heads(self) -> tuple[str, ...]:
        """Those of the heads, or the first of them, if each of their parts reads one head."""
        names = self.names("n")
        if self.kv_heads % self.count("n") == 0:
            return names
        first = (names[:end] for end in range(len(names)))
        return next((some for some in first if self._devices(some) == self.kv_heads), ())

    def count(self, letter: str) -> int:
        """How many parts it has."""
        return self._devices(self.names(letter))

    def _devices(self, names: Sequence[str]) -> int:
        return math.prod(dict(self.mesh)[name] for name in names)

    def number(self, letter: str) -> Array:
        """Which of them this device has."""
        number, sizes = jnp.int32(0), dict(self.mesh)
        for name in dict(self.axes).get(letter, ()):
            number = number * sizes[name] + lax.axis_index(name)
        return number

    def with_axis_of_kv_heads(self) -> "Cut":
        """With a mesh axis of the heads split in two, if the first ones then have a part for each key/value head."""
        left = self.kv_heads
        for name, size in ((name, dict(self.mesh)[name]) for name in self.names("n")):
            if left > 1 and left < size and size % left == 0:
                return self._split(name, left)
            if left % size != 0:
                break
            left //= size
        return self

    def _split(self, name: str, first: int) -> "Cut":
        halves = f"{name} of kv_heads", f"{name} of groups"
        sizes = zip(halves, (first, dict(self.mesh)[name] // first))
        parts = {name: (*sizes,)}
        mesh = tuple(part for one in self.mesh for part in parts.get(one[0], (one,)))
        new_names = lambda names: tuple(part for one in names for part in (halves if one == name else (one,)))
        return replace(self, mesh=mesh, axes=tuple((letter, new_names(names)) for letter, names in self.axes))

    def spec(self, letters: str, shape: Sequence[int]) -> PartitionSpec:
        """An axis of size 1 is shared by all devices."""
        return PartitionSpec(*(self.names(x) or None if n != 1 else None for x, n in zip(letters, shape, strict=True)))

    def summed(self, letters: str, shape: Sequence[int]) -> tuple[str, ...]:
        """The mesh axes over which the gradient of an operand is summed."""
        own = {name for x, n in zip(letters, shape, strict=True) if n != 1 for name in self.names(x)}
        return tuple(name for letter in "btn" for name in self.names(letter) if name not in own)

    # -- on a device --------------------------------------------------------------------------------------------------

    @property
    def shares_kv_heads(self) -> bool:
        """Whether several parts of the heads read the same key/value head."""
        return self.count("n") > 1 and not self.names("k")

    def own_kv_head(self, letters: str, x: Array) -> Array:
        """The only key/value head that the heads of this device read."""
        if "k" not in letters or not self.shares_kv_heads:
            return x
        return lax.dynamic_slice_in_dim(x, self._kv_head(), 1, letters.index("k"))

    def among_kv_heads(self, letters: str, x: Array) -> Array:
        """Zeros for all other key/value heads."""
        if "k" not in letters or not self.shares_kv_heads:
            return x
        axis = letters.index("k")
        zeros = jnp.zeros((*x.shape[:axis], self.kv_heads, *x.shape[axis + 1 :]), x.dtype)
        return lax.dynamic_update_slice_in_dim(zeros, x, self._kv_head(), axis)

    def _kv_head(self) -> Array:
        return self.number("n") * self.kv_heads // self.count("n")

    def local(self, inputs: Inputs) -> Inputs:
        """The inputs of this device, whose arrays are cut, with the numbers of its first query and head."""
        rows, heads = inputs.sizes.T, inputs.sizes.N
        row, head = (self.number(letter) * n for letter, n in (("t", rows), ("n", heads)))
        mask, dropout, score_fn = inputs.mask, inputs.dropout, inputs.score_fn
        if self.count("t") > 1:
            mask = _moved(mask, row)
        if self.count("n") > 1:
            score_fn = None if score_fn is None else score_fn.with_first(head=head, of_scores=True)
            of_mask = None if mask.function is None else mask.function.with_first(head=head, of_scores=False)
            mask = replace(mask, function=of_mask)
        if dropout is not None and self.count("t") * self.count("n") > 1:
            dropout = dropout.with_first(head=head, row=row)
        return replace(inputs, mask=mask, dropout=dropout, score_fn=score_fn)


def _moved(mask: masks.Mask, row: Array) -> masks.Mask:
    offset = jnp.zeros(1, jnp.int32) if mask.query_offset is None else mask.query_offset
    lengths = None if mask.query_lengths is None else mask.query_lengths - row
    return replace(mask, query_offset=offset + row, query_lengths=lengths)
