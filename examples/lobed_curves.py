"""Closed curves with two or three lobes, turned by any angle, as points of the plane, for `meanflow.py`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

LOBES = 2, 3


def curves(lobes: Int[Array, " B"], turn: Float[Array, " B"], points: int) -> Float[Array, "B T 2"]:
    """Points at equal angles; `lobes` and `turn` (radians) of each curve."""
    angle = jnp.arange(points) * (2 * math.pi / points)
    radius = 1 + 0.5 * jnp.cos(lobes[:, None] * (angle - turn[:, None]))
    return radius[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def draw(key: PRNGKeyArray, count: int, points: int) -> Float[Array, "B T 2"]:
    of_lobes, of_turn = jax.random.split(key)
    lobes = jax.random.choice(of_lobes, jnp.array(LOBES), (count,))
    return curves(lobes, jax.random.uniform(of_turn, (count,)) * 2 * math.pi, points)


def nearest(samples: Float[Array, "B T 2"], turns: int = 120) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Root mean square distance of the points from those of the nearest curve, and the lobes of this curve."""
    lobes = jnp.repeat(jnp.array(LOBES), turns)
    turn = jnp.tile(jnp.arange(turns) * 2 * math.pi / turns, len(LOBES)) / lobes
    every = curves(lobes, turn, samples.shape[1])
    distance = jnp.sqrt(jnp.mean(jnp.sum((samples[:, None] - every) ** 2, axis=-1), axis=-1))
    return jnp.min(distance, axis=1), lobes[jnp.argmin(distance, axis=1)]


def plot(axes: Any, drawn: Float[Array, "B T 2"]) -> None:
    """In rows of five."""
    for number, curve in enumerate(np.asarray(drawn)):
        row, column = divmod(number, 5)
        closed = np.concatenate([curve, curve[:1]]) + 4 * np.array([column, -row])
        axes.plot(*closed.T, ".-", markersize=3, linewidth=1)
    axes.set(aspect="equal", xticks=[], yticks=[])
