"""Draws docs/tile_walk.png and docs/shares.png from the tables that the kernels read, and docs/functions.png from the
functions of masks: python docs/draw.py
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

from mqa_jax import functions
from mqa_jax.inputs import Sizes
from mqa_jax.kernels import tile_bounds
from mqa_jax.kernels.triton.grid import Share
from mqa_jax.masks import Mask

FOLDER = Path(__file__).parent
LENGTH, TILE = 512, 64
SIZES = Sizes(B=1, T=LENGTH, S=LENGTH, N=1, K=1, G=1, H=64, V=64)
DOCUMENTS = jnp.asarray(np.repeat([0, 1, 2], [192, 100, 220])[None], jnp.int32)
MASKS = {
    "causal": Mask(is_causal=True),
    "causal, window of 160": Mask(is_causal=True, window=(160, 0)),
    "causal, 300 keys": Mask(is_causal=True, key_lengths=jnp.array([300])),
    "causal, three documents": Mask(is_causal=True, query_segments=DOCUMENTS, key_segments=DOCUMENTS),
}
COLOURS = {"never visited": "#eeeeee", "visited with the mask": "#f2a65a", "visited without it": "#3d7ea6"}
SHARES = ["#3d7ea6", "#f2a65a", "#7a9e7e", "#c8553d"]


def draw_tile_walk() -> None:
    """Which tiles the forward pass and dQ visit, and in which order."""
    figure, axes = plt.subplots(1, len(MASKS), figsize=(15, 4.4), layout="constrained")
    for axis, (title, mask) in zip(axes, MASKS.items()):
        table = np.asarray(tile_bounds.key_tiles(mask, SIZES, TILE, TILE))[0]
        kind, order = np.zeros((LENGTH // TILE,) * 2, int), {}
        for row, (start, full_start, full_stop, stop) in enumerate(table):
            masked = [*range(start, full_start), *range(full_stop, stop)]
            full = list(range(full_start, full_stop))
            kind[row, masked], kind[row, full] = 1, 2
            order |= {(row, column): step for step, column in enumerate(full + masked, start=1)}
        axis.imshow(kind, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=2)
        for (row, column), step in order.items():
            axis.text(column, row, str(step), ha="center", va="center", color="white")
        frame(axis, title, "tile of keys", "tile of queries = program")
    handles = [Patch(color=colour, label=label) for label, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(FOLDER / "tile_walk.png", dpi=110)


def draw_shares() -> None:
    """How dK and dV of one key/value head with six query heads are cut among four programs: each loop by itself."""
    heads, shares = 6, 4
    table = np.asarray(tile_bounds.row_tiles(Mask(is_causal=True), SIZES, TILE, TILE))[0]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    for axis, tile in zip(axes, (0, 3, 6)):
        start, full_start, full_stop, stop = map(int, table[tile])
        owner = np.full((heads, LENGTH // TILE), -1)
        for tiles in (list(range(full_start, full_stop)), [*range(start, full_start), *range(full_stop, stop)]):
            for share in range(shares):
                first, last = map(int, Share(jnp.int32(share), shares).range(jnp.int32(len(tiles) * heads)))
                for number in range(first, last):
                    owner[number // len(tiles), tiles[number % len(tiles)]] = share
        axis.imshow(owner, cmap=ListedColormap(["#eeeeee", *SHARES]), vmin=-1, vmax=shares - 1, aspect="auto")
        axis.set_yticks(range(heads))
        frame(axis, f"dK and dV of key tile {tile}, causal", "tile of queries", "query head of the group")
    handles = [Patch(color=colour, label=f"program {i}") for i, colour in enumerate(SHARES)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(FOLDER / "shares.png", dpi=110)


def draw_functions() -> None:
    """The masks of `mqa_jax.functions`, and what T5's buckets add to the scores of one head."""
    ids = jnp.asarray(np.repeat([0, 1, 2], [7, 4, 13])[None])
    parents = np.eye(12, dtype=bool)
    for node in range(1, 12):
        parents[node] |= parents[(node - 1) // 2]
    masks: dict[str, tuple[Any, ...]] = {
        "prefix of 9 keys": (functions.prefix, jnp.array([9])),
        "documents": (functions.documents, ids),
        "dilated, every 3rd key": (functions.dilated, 3),
        "image of width 6, radius 1": (functions.neighbourhood, 6, 1),
        "2 sinks, window of 6": (functions.sink_and_window, 2, 6),
        "tree of 12 tokens after 12 keys": (functions.tree, jnp.array([12]), jnp.asarray(parents)),
    }
    query, key = np.ogrid[:24, :24]
    figure, axes = plt.subplots(2, 4, figsize=(15, 8), layout="constrained")
    for axis, (title, (function, *arrays)) in zip(axes.flat, masks.items()):
        visible = function(0, 0, jnp.asarray(query), jnp.asarray(key), *arrays)
        axis.imshow(visible, cmap=ListedColormap([COLOURS["never visited"], COLOURS["visited without it"]]))
        frame(axis, title, "key", "query")
    table = jnp.asarray(np.random.default_rng(0).permutation(16).astype(np.float32))[:, None]
    for axis, function in zip(axes.flat[len(masks) :], (functions.t5, functions.t5_causal)):
        added = np.array(function(jnp.zeros((24, 24)), 0, 0, jnp.asarray(query), jnp.asarray(key), table))
        if function is functions.t5_causal:
            added[key > query] = np.nan
        axis.imshow(added, cmap="Spectral")
        frame(axis, f"{function.__name__}, a random table of 16", "key", "query")
    figure.savefig(FOLDER / "functions.png", dpi=90)


def frame(axis: Any, title: str, across: str, down: str) -> None:
    axis.set(title=title, xlabel=across, ylabel=down)
    axis.set_xticks(np.arange(axis.get_xlim()[1]) - 0.5, minor=True)
    axis.set_yticks(np.arange(axis.get_ylim()[0]) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=2)
    axis.tick_params(which="both", length=0)


if __name__ == "__main__":
    draw_tile_walk()
    draw_shares()
    draw_functions()
