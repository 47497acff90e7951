"""How keys and values get to the queries of other devices, and their gradients back.

    Ring        keys and values travel from device to device, and each computes with what it has at the moment (Liu et
                al. 2023, "Ring Attention", arXiv 2310.01889); memory is linear in what a device has
    AllGather   every device gets all keys and values at once (Grattafiori et al. 2024, "The Llama 3 Herd of Models",
                arXiv 2407.21783, section 3.3.2)

Both call `step(chunks, held, carry)`: chunks of keys, their keys and values (in forward mode their tangents, too), and
what is summed over all steps. In the backward pass it also returns the gradients of keys and values, float32, which are
summed over devices before they are rounded.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mqa_jax.axes import alike
from mqa_jax.inputs import Inputs
from mqa_jax.sharded.chunks import Chunk, Order
from mqa_jax.sharded.zigzag import unzigzag, zigzag

AxisName = str | tuple[str, ...]
Held = Sequence[tuple[Array, Array]]  # keys and values of each chunk, or their gradients
Carry = Any


def varying_like(tree: Any, x: Array) -> Any:
    """Constants with the varying axes of an array, for the carry of a loop."""
    return jax.tree.map(lambda zeros: alike([zeros, x])[0], tree)


@dataclass(frozen=True)
class AllGather:
    axis: AxisName
    order: Order

    def forward(self, own: Any, step: Callable[..., Carry], carry: Carry) -> Carry:
        return step(*self._all(own), carry)

    def backward(
        self, key: Array, value: Array, step: Callable[..., tuple[Carry, Held]], carry: Carry
    ) -> tuple[Carry, Array, Array]:
        carry, ((d_key, d_value),) = step(*self._all((key, value)), carry)
        return carry, self._own(d_key), self._own(d_value)

    def whole(self, x: Any, axis: int = 1) -> Any:
        """An array with all columns, in the order of the sequence."""
        return x if x is None or self.order.count == 1 or x.shape[axis] == 1 else unzigzag(x, self.order.devices, axis)

    def _all(self, own: Any) -> tuple[list[Chunk], list[Any]]:
        held = jax.tree.map(lambda x: self.whole(lax.all_gather(x, self.axis, axis=1, tiled=True)), own)
        length = jax.tree.leaves(held)[0].shape[1]
        return [Chunk(jnp.int32(0), 0, jnp.int32(0), length)], [held]

    def _own(self, gradient: Array) -> Array:
        if self.order.count > 1:
            gradient = zigzag(gradient, self.order.devices)
        return lax.psum_scatter(gradient, self.axis, scatter_dimension=1, tiled=True)


@dataclass(frozen=True)
class Ring:
    """Device d begins with the keys of device d + `ahead`, and then gets those of the devices before, in `steps` steps.

    Keys and values are one message, because XLA hides one message at a time behind the computation. It is sent before
    the computation with the same keys; the gradients follow behind them, and are sent home at the end.
    """

    axis: AxisName
    order: Order
    ahead: int
    steps: int

    @classmethod
    def make(cls, axis: AxisName, order: Order, inputs: Inputs) -> "Ring":
        """As few steps as the window needs."""
        size, mask, devices = inputs.sizes, inputs.mask, order.devices
        left, right = mask.reach
        if left is None or right is None or size.T != size.S or mask.query_offset is not None or order.count > 1:
            return cls(axis, order, 0, devices)
        ahead, behind = (-(-reach // size.S) for reach in (right, left))
        steps = 1 + ahead + behind
        return cls(axis, order, ahead, steps) if steps < devices else cls(axis, order, 0, devices)

    def whole(self, x: Any, axis: int = 1) -> Any:
        """The order of columns is that of the devices, which is the order in which keys arrive."""
        return x

    def forward(self, own: Any, step: Callable[..., Carry], carry: Carry) -> Carry:
        key, *_ = jax.tree.leaves(own)
        message = _Message.of(self._chunks(0, key), own)

        def turn(number: Any, state: tuple[Array, Carry]) -> tuple[Array, Carry]:
            held, carry = state
            following = self._sent(held, by=1)
            return following, step(self._chunks(number, key), message.unpack(held), carry)

        state = self._sent(message.flat, by=-self.ahead), carry
        held, carry = self._turns(turn, state)
        return step(self._chunks(self.steps - 1, key), message.unpack(held), carry)

    def backward(
        self, key: Array, value: Array, step: Callable[..., tuple[Carry, Held]], carry: Carry
    ) -> tuple[Carry, Array, Array]:
        message = _Message.of(self._chunks(0, key), (key, value))
        shape = jax.eval_shape(lambda: step(self._chunks(0, key), message.unpack(message.flat), carry))[1][0][0]

        def turn(number: Any, state: tuple[Array, Array, Carry]) -> tuple[Array, Array, Carry]:
            held, gradient, carry = state
            following = self._sent(held, by=1)
            carry, parts = step(self._chunks(number, key), message.unpack(held), carry)
            return following, self._sent(gradient + _pack(parts), by=1), carry

        zeros = varying_like(jnp.zeros(message.flat.shape, shape.dtype), message.flat)
        held, gradient, carry = self._turns(turn, (self._sent(message.flat, by=-self.ahead), zeros, carry))
        carry, parts = step(self._chunks(self.steps - 1, key), message.unpack(held), carry)
        at_home = message.unpack(self._sent(gradient + _pack(parts), by=self.ahead - (self.steps - 1)))
        d_key, d_value = (jnp.concatenate(chunks, axis=1) for chunks in zip(*at_home))
        return carry, d_key, d_value

    def _turns(self, turn: Callable, state: Any) -> Any:
        """All steps but the last, after which nothing is sent on."""
        return lax.fori_loop(0, self.steps - 1, turn, state) if self.steps > 1 else state

    def _chunks(self, number: Any, key: Array) -> list[Chunk]:
        """Of the keys that this device has in a step."""
        owner = lax.rem(lax.axis_index(self.axis) + (self.order.devices + self.ahead) - number, self.order.devices)
        return self.order.chunks(owner, key.shape[1])

    def _sent(self, x: Array, by: int) -> Array:
        devices = self.order.devices
        if by % devices == 0:
            return x
        return lax.ppermute(x, self.axis, [(i, (i + by) % devices) for i in range(devices)])


@dataclass(frozen=True)
class _Message:
    """The arrays of all chunks, one after the other: each is contiguous, whatever H and V are."""

    flat: Array
    shapes: list[tuple[int, ...]]
    tree: Any

    @classmethod
    def of(cls, chunks: Sequence[Chunk], own: Any) -> "_Message":
        held = [jax.tree.map(chunk.of, own) for chunk in chunks]
        return cls(_pack(held), [x.shape for x in jax.tree.leaves(held)], jax.tree.structure(held))

    def unpack(self, flat: Array) -> list[Any]:
        ends = [*itertools.accumulate(map(math.prod, self.shapes))]
        parts = [x.reshape(shape) for x, shape in zip(jnp.split(flat, ends[:-1]), self.shapes, strict=True)]
        return jax.tree.unflatten(self.tree, parts)


def _pack(held: Any) -> Array:
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(held)])
