"""Runs Triton kernels on the CPU, one program after the other, with a memory that forgives nothing.

Interpret mode pads what a kernel reads and drops what it writes beyond an array; a GPU reads and overwrites what lies
there. Here each entry that is touched has to exist, and each entry of a result has to be written exactly once.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mqa_jax.kernels.triton import call


class Memory:
    """An array in the memory of the GPU, and how often each of its entries has been written."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values)
        self.writes = np.zeros(self.values.shape, int)
        self.shape, self.dtype = self.values.shape, self.values.dtype

    @property
    def at(self) -> "Memory":
        return self

    def __getitem__(self, index: tuple) -> "tuple[Memory, tuple]":
        return self, index


def strict_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes every kernel run there, from now on; returns the names of those that ran."""
    ran: list[str] = []
    program = [0, 0, 0]

    def pallas_call(body: Callable, *, out_shape: Any, grid: tuple, name: str, **_: Any) -> Callable:
        def run(*arguments: Any) -> Any:
            ran.append(name)
            inputs = jax.tree.map(Memory, arguments)
            results = jax.tree.map(lambda x: Memory(np.full(x.shape, np.nan).astype(x.dtype)), out_shape)
            several = isinstance(out_shape, tuple)
            for place in itertools.product(*map(range, grid)):
                program[:] = place
                body(*inputs, *(results if several else (results,)))
            for memory in jax.tree.leaves(results):
                assert (memory.writes == 1).all(), f"{name}: entries written {np.unique(memory.writes)} times"
            return jax.tree.map(lambda memory: jnp.asarray(memory.values), results)

        return run

    monkeypatch.setattr(call.pallas, "pallas_call", pallas_call)
    monkeypatch.setattr(call.pallas, "program_id", lambda axis: jnp.int32(program[axis]))
    monkeypatch.setattr(call.triton, "load", load)
    monkeypatch.setattr(call.triton, "store", store)
    return ran


def load(part: tuple[Memory, tuple], mask: Any = None, other: Any = None) -> Any:
    memory, index = part
    index, touched = _entries(memory, index, mask, "read")
    values = memory.values[index]
    return jnp.asarray(values if mask is None else np.where(touched, values, np.asarray(other)))


def store(part: tuple[Memory, tuple], value: Any, mask: Any = None) -> None:
    memory, index = part
    index, touched = _entries(memory, index, mask, "written")
    entries = tuple(i[touched] for i in index)
    memory.values[entries] = np.asarray(value)[touched]
    np.add.at(memory.writes, entries, 1)


def _entries(memory: Memory, index: tuple, mask: Any, what: str) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """An index for each axis, and which of the entries are touched; all of these have to exist."""
    assert len(index) == len(memory.shape)
    is_span = [hasattr(i, "size") and hasattr(i, "start") for i in index]
    # Numbers of rows come first, in the order of the axes of what is read; then a new axis for each span.
    rows = np.broadcast_shapes(*[np.shape(i) for i, span in zip(index, is_span) if not span])
    lines = iter(np.ix_(*[np.arange(i.size) + int(i.start) for i, span in zip(index, is_span) if span]))
    trailing = (1,) * sum(is_span)
    places = [next(lines) if span else np.asarray(i).reshape(np.shape(i) + trailing) for i, span in zip(index, is_span)]
    places = list(np.broadcast_arrays(*places, np.empty(rows + trailing))[:-1])
    touched = np.ones(places[0].shape, bool) if mask is None else np.asarray(mask)
    assert touched.shape == places[0].shape, f"a mask of shape {touched.shape} for {places[0].shape}"
    for axis, (place, length) in enumerate(zip(places, memory.shape)):
        wrong = touched & ((place < 0) | (place >= length))
        assert not wrong.any(), f"{place[wrong][0]} on axis {axis} of {memory.shape} is {what}"
    return tuple(np.clip(place, 0, length - 1) for place, length in zip(places, memory.shape)), touched
