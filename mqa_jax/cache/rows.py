"""What users do with a `cache` collection: reorder and reset its rows, look for full ones, count its bytes.

A collection may be any pytree around the caches of attention modules: dicts, lists, tuples, frozen dicts, dataclasses.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import checkify
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from mqa_jax.cache.checks import FULL, MAX_INT32, SPOILED, within
from mqa_jax.cache.layout import CONTENTS, INDEX, KEY, NAMES, RING_INDEX


class Leaf(NamedTuple):
    """An array of a collection.

    Attributes:
      path: where it is, as JAX writes it.
      owner: path of the attention module to whose cache it belongs; None for arrays of other modules.
      name: one of `layout.NAMES`, if it belongs to one.
    """

    path: str
    owner: str | None
    name: str | None
    array: Array


def reorder_cache(cache: Any, rows: Int[ArrayLike, " B"], *, batch_axis: int | None = None) -> Any:
    """Row b of the result is row `rows[b]` of `cache`, a `cache` collection: what beam search does after each step.

    Under jit a row that is taken from outside the batch gives NaN until it is reset, and fails a check for `checkify`.

    Args:
      rows: one integer from 0 to B - 1 for each row.
      batch_axis: needed where a model stacks its layers, whose caches then have a layer axis too: which axis of
        `cache_index` is the batch. 1 where `nn.scan` has `variable_axes={"cache": 0}`; -1, the last one, also where
        scans are nested. Caches that are not stacked have one axis and need none.
    """
    caches = _Caches.of(cache, batch_axis)
    rows = jnp.asarray(rows) if isinstance(rows, list | tuple) else rows
    _check_rows(
        rows, caches.batch, jnp.issubdtype(jnp.result_type(rows), jnp.integer), "integer [batch], where each comes from"
    )
    rows, outside = within(rows, 0, caches.batch - 1, "rows must be rows of the cache, 0 to {high}: rows={value}.")

    def reorder(leaf: Leaf) -> Array:
        axis = caches.axis_of(leaf)
        taken = _take(leaf.array, rows, axis)
        return jnp.where(_along(axis, outside, taken), -1, taken) if leaf.name in (INDEX, RING_INDEX) else taken

    return caches.map(reorder)


def _take(array: Array, rows: Array, axis: int) -> Array:
    """Rows of an axis; where Explicit mesh axes cut it, it is gathered, as any device may have them, and cut again."""
    spec = jax.typeof(array).sharding.spec
    if not spec[axis]:
        return jnp.take(array, rows, axis=axis, mode="clip")
    gathered = jax.sharding.reshard(array, P(*spec[:axis], None, *spec[axis + 1 :]))
    taken = jnp.take(gathered, jax.sharding.reshard(rows, P(None)), axis=axis, mode="clip")
    return jax.sharding.reshard(taken, spec)


def reset_cache(cache: Any, rows: Bool[ArrayLike, " B"], *, batch_axis: int | None = None) -> Any:
    """Starts the rows anew where `rows` is True: their index becomes 0, and what they held is no longer seen.

    `batch_axis`: as in `reorder_cache`.
    """
    rows = jnp.asarray(rows)
    _check_rows(rows, None, rows.dtype == jnp.bool_, "bool [batch], True = reset")
    caches = _Caches.of(cache, batch_axis)
    _check_rows(rows, caches.batch, True, "bool [batch], True = reset")

    def reset(leaf: Leaf) -> Array:
        if leaf.owner is None:
            raise ValueError(
                f"How {leaf.path} starts anew is not known here: it is no array of an attention module, "
                f"shape={leaf.array.shape}. Reset the caches of the attention modules alone, and this one yourself."
            )
        if leaf.name in CONTENTS:
            return leaf.array
        return jnp.where(_along(caches.axis_of(leaf), rows, leaf.array), 0, leaf.array)

    return caches.map(reset)


def check_cache(cache: Any) -> None:
    """Raises if any row of a `cache` collection was given more tokens than fit, or what cannot be a number of tokens.

    Such a row only shows NaN by itself. Ring buffers are never full.

    Under jit it is a `jax.experimental.checkify.check`, so the function has to be transformed by `checkify.checkify`.
    Modules make this check by themselves, as one that does nothing without `checkify`.
    """
    leaves = _leaves(cache)[0]
    lengths = {leaf.owner: leaf.array.shape[-3] for leaf in leaves if leaf.name == KEY}
    for leaf in leaves:
        if leaf.owner is not None and leaf.name in (INDEX, RING_INDEX):
            limits = [(0, MAX_INT32, SPOILED)]
            limits += [(-1, lengths[leaf.owner], FULL)] if leaf.name == INDEX else []
            for low, high, message in limits:
                if isinstance(leaf.array, jax.core.Tracer):
                    lowest, highest = jnp.min(leaf.array), jnp.max(leaf.array)
                    worst = lowest if message is SPOILED else highest
                    checkify.check((lowest >= low) & (highest <= high), message, value=worst, high=jnp.int32(high))
                else:
                    within(leaf.array, low, high, message)


def cache_bytes(cache: Any) -> int:
    """Bytes of the cached keys and values of a `cache` collection, with their scales if they have any."""
    return sum(leaf.array.size * leaf.array.dtype.itemsize for leaf in _leaves(cache)[0] if leaf.name in CONTENTS)


# -- where the caches are in a collection -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Caches:
    """The caches of a collection, in which rows are found."""

    leaves: list[Leaf]
    structure: Any
    batch_axis: int | None
    ranks: dict[str, int]  # of the index of each attention module: 1, or more where layers are stacked
    batch: int

    @classmethod
    def of(cls, cache: Any, batch_axis: int | None) -> "_Caches":
        leaves, structure = _leaves(cache)
        indices = {leaf.owner: leaf for leaf in leaves if leaf.owner is not None and leaf.name in (INDEX, RING_INDEX)}
        ranks = {owner: leaf.array.ndim for owner, leaf in indices.items()}
        for rank in ranks.values():
            if rank > 1 and (batch_axis is None or not -rank <= batch_axis < rank):
                shapes = {leaf.path: leaf.array.shape for leaf in indices.values()}
                raise ValueError(
                    f"Layers are stacked in this cache, so say which axis of cache_index is the batch: {shapes}, "
                    f"batch_axis={batch_axis}. It is 1 where nn.scan has variable_axes={{'cache': 0}}, "
                    "and -1 for any number of such axes in front."
                )
        caches = cls(leaves, structure, batch_axis, ranks, batch=0)
        batches = {leaf.path: leaf.array.shape[caches.axis_of(leaf)] for leaf in indices.values()}
        if len(set(batches.values())) != 1:
            raise ValueError(f"The caches of one batch have the same rows: rows={batches}, batch_axis={batch_axis}.")
        return dataclasses.replace(caches, batch=next(iter(batches.values())))

    def axis_of(self, leaf: Leaf) -> int:
        """The batch axis of an array, counted from the front."""
        if leaf.owner is not None:
            rank = self.ranks[leaf.owner]
            return 0 if rank == 1 else (self.batch_axis or 0) % rank
        axis = 0 if self.batch_axis is None else self.batch_axis
        if not 0 <= axis < leaf.array.ndim or leaf.array.shape[axis] != self.batch:
            raise ValueError(
                f"{leaf.path} is no array of an attention module, and its batch axis is not found: "
                f"shape={leaf.array.shape}, batch={self.batch}, batch_axis={self.batch_axis}. "
                "Pass the caches of the attention modules alone."
            )
        return axis

    def map(self, change: Callable[[Leaf], Array]) -> Any:
        return self.structure.unflatten([change(leaf) for leaf in self.leaves])


def _leaves(cache: Any) -> tuple[list[Leaf], Any]:
    """All arrays of a collection. A cache is what lies beside a `cached_key` under one of the names."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(cache)
    placed = []
    for path, array in with_paths:
        names = [str(getattr(key, "key", getattr(key, "name", None))) for key in path]
        # The last name that is ours; behind it may be a box, such as nn.Partitioned.
        at = next((i for i in reversed(range(len(names))) if names[i] in NAMES), None)
        owner = None if at is None else jax.tree_util.keystr(path[:at])
        placed.append(Leaf(jax.tree_util.keystr(path), owner, None if at is None else names[at], array))
    owners = {leaf.owner for leaf in placed if leaf.name == KEY} & {
        leaf.owner for leaf in placed if leaf.name in (INDEX, RING_INDEX) and leaf.array.ndim > 0
    }
    leaves = [leaf if leaf.owner in owners else leaf._replace(owner=None, name=None) for leaf in placed]
    if not owners:
        raise ValueError(
            "This holds no cache of an attention module: "
            f"arrays={[leaf.path for leaf in leaves]}. Pass the `cache` collection that init_cache made."
        )
    return leaves, structure


def _check_rows(rows: Any, batch: int | None, right_dtype: bool, rule: str) -> None:
    shape = jnp.shape(rows)
    if not right_dtype or len(shape) != 1 or batch not in (None, shape[0]):
        raise ValueError(
            f"rows must be {rule}: rows.dtype={jnp.result_type(rows)!s}, rows.shape={shape}, "
            f"batch={'any' if batch is None else batch}."
        )


def _along(axis: int, rows: Array, like: Array) -> Array:
    return rows.reshape((-1,) + (1,) * (like.ndim - axis - 1))
