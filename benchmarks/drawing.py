"""How pictures look: colours and markers, axes, legends, and names beside points."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Row = dict[str, Any]

# Okabe and Ito's colours, which colour-blind people tell apart, with a marker of its own for each.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F", "#000000")
MARKERS = "osD^vPX*"
LEADING = ("jax.nn", "torch", "tokamax chunked", "torch flex", "flax.linen", "flax.nnx", "torch, our cache layout")


def style_of(peers: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each peer: the same in every picture for those that lead, and a colour for us alone."""
    others = [name for name in dict.fromkeys([*LEADING, *peers]) if name != "ours"]
    kinds = len(COLOURS) - 1
    marker = lambda number: MARKERS[1 + (number + number // kinds) % (len(MARKERS) - 1)]  # not twice for a colour
    styles = {
        name: {"color": COLOURS[1 + number % kinds], "marker": marker(number)} for number, name in enumerate(others)
    }
    return {"ours": {"color": COLOURS[0], "marker": MARKERS[0]}, **styles}


def by_peer(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Ours first, as the others are drawn over it."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["peer"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0] != "ours"))


def plain_numbers(axis: Any, ticks: Iterable[float] | None = None) -> None:
    """1,024 and 0.1 instead of powers of ten; at the numbers that were measured, if they are given."""
    axis.set_major_formatter(FuncFormatter(lambda x, position: f"{x:,.12g}"))
    if ticks is not None:
        axis.set_ticks(sorted(set(ticks)))
    elif axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5), numticks=12))
    axis.set_minor_formatter(NullFormatter())


def curves(axis: Any, rows: Iterable[Row], x: str, y: Callable[[Row], float | None], style: dict[str, Any]) -> None:
    """A line for each peer, both axes logarithmic."""
    ticks = []
    for peer, found in by_peer(rows).items():
        points = sorted((row[x], value) for row in found if (value := y(row)) is not None)
        if points:
            width = 2.6 if peer == "ours" else 1.5
            axis.plot(*zip(*points), label=peer, linewidth=width, markersize=7, **style[peer])
            ticks += [point[0] for point in points]
    axis.set(xscale="log", yscale="log")
    if ticks:
        plain_numbers(axis.xaxis, ticks)
        plain_numbers(axis.yaxis)
    axis.grid(alpha=0.3, which="major")


def legend_of(figure: Any, axes: Iterable[Any]) -> None:
    """One for all axes, under them, where it covers nothing."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    columns = int(figure.get_size_inches()[0] / 2.4)
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(columns, len(handles)), frameon=False
    )


CHARACTER, HEIGHT, GAP = 5.4, 11, 7  # of a label, in pixels


def label_points(axis: Any, points: list[tuple[str, float, float]]) -> None:
    """A name beside each point, on a side where it covers no other; one that has none is left to the table."""
    pixels = axis.transData.transform([(x, y) for _, x, y in points])
    taken = [(x - GAP / 2, y - GAP / 2, x + GAP / 2, y + GAP / 2) for x, y in pixels]
    right = axis.get_window_extent().x1
    for (name, x, y), (left, middle) in zip(points, pixels):
        width = CHARACTER * len(name)
        places = {(GAP, 0): "left", (-GAP, 0): "right", (0, HEIGHT): "center", (0, -HEIGHT): "center"}
        for (across, up), side in places.items():
            start = left + across - {"left": 0, "right": width, "center": width / 2}[side]
            box = start, middle + up - HEIGHT / 2, start + width, middle + up + HEIGHT / 2
            if box[2] < right and not any(overlap(box, other) for other in taken):
                taken.append(box)
                offset = across * 0.72, up * 0.72  # points, of which an inch has 72, from pixels, of which it has 100
                axis.annotate(name, (x, y), offset, textcoords="offset points", ha=side, va="center", fontsize=7.5)
                break


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Of two boxes: left, bottom, right, top."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
