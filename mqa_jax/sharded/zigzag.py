"""The order of tokens in which devices that share a sequence have equal work under a causal mask.

With 2 n chunks of the sequence, device d of n has chunks d and 2 n - 1 - d, of which one has few keys before it and the
other many (Brandon et al. 2023, "Striped Attention", arXiv 2311.09431, balance alike; the pairing is that of Zhu 2024,
`zigzag_ring_flash_attn`). With 3 devices:

    tokens    0 1 2 3 4 5 6 7 8 9 10 11
    zigzag    0 1 10 11 | 2 3 8 9 | 4 5 6 7
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Shaped

from mqa_jax.arguments import array, shown, whole_number


def zigzag(x: ArrayLike, devices: int, axis: int = 1) -> Shaped[Array, "..."]:
    """The array with its tokens in zigzag order, so that equal parts of the axis are what each device has.

    All that has an axis of tokens is reordered: tokens, labels, positions, segments, both axes of a bias or mask.

    Args:
      x: an array of any dtype.
      devices: among which the axis is cut, n.
      axis: of tokens; its length is a multiple of 2 n.

    Raises:
      ValueError: the length is no multiple of 2 n, or an argument is no number.
    """
    x, axis, count = _checked(x, devices, axis)
    chunks = jnp.moveaxis(x, axis, 0).reshape(2, count, -1, *x.shape[:axis], *x.shape[axis + 1 :])
    pairs = jnp.stack([chunks[0], chunks[1, ::-1]], axis=1)
    return jnp.moveaxis(pairs.reshape(-1, *pairs.shape[3:]), 0, axis)


def unzigzag(x: ArrayLike, devices: int, axis: int = 1) -> Shaped[Array, "..."]:
    """The inverse of `zigzag`, with its arguments and errors."""
    x, axis, count = _checked(x, devices, axis)
    pairs = jnp.moveaxis(x, axis, 0).reshape(count, 2, -1, *x.shape[:axis], *x.shape[axis + 1 :])
    chunks = jnp.concatenate([pairs[:, 0], pairs[::-1, 1]])
    return jnp.moveaxis(chunks.reshape(-1, *chunks.shape[2:]), 0, axis)


def zigzag_positions(length: int, devices: int) -> Int[Array, " T"]:
    """The position of each token of a sequence in zigzag order, int32 `[T]`, as rotary embeddings need them.

    Args:
      length: T, a multiple of 2 n.
      devices: n.

    Raises:
      ValueError: as `zigzag`.
    """
    places, _, count = _checked(jnp.arange(length, dtype=jnp.int32), devices, axis=0)
    return positions_at(places, length, count)


def positions_at(places: Int[Array, " X"], length: int, devices: int) -> Int[Array, " X"]:
    """The positions of the tokens at these places of a sequence in zigzag order.

    Computed for each place by itself, so that devices that have parts of them send nothing.
    """
    size = length // (2 * devices)
    chunk, within = lax.div(places, jnp.int32(size)), lax.rem(places, jnp.int32(size))
    device = lax.shift_right_logical(chunk, jnp.int32(1))
    number = jnp.where(chunk == 2 * device, device, 2 * devices - 1 - device)
    return number * size + within


def _checked(x: ArrayLike, devices: int, axis: int) -> tuple[Array, int, int]:
    x, count, number = array("x", x), whole_number(devices), whole_number(axis)
    if count is None or count < 1:
        raise ValueError(f"devices must be a positive int: devices={shown(devices)}. It is the size of the mesh axis.")
    if number is None or not -x.ndim <= number < x.ndim:
        raise ValueError(
            f"axis must be one of the axes of x: axis={shown(axis)}, x.shape={x.shape}. Name that of tokens."
        )
    number %= x.ndim
    if x.shape[number] % (2 * count):
        raise ValueError(
            "In zigzag order each device has two chunks of equal length, so the length must be a multiple of "
            f"2 * devices: x.shape[{number}]={x.shape[number]}, devices={count}. Pad the sequence."
        )
    return x, number, count
