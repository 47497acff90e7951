"""What a comparison finds, as a table, JSON or a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Difference:
    """One tensor, computed by both.

    Attributes:
      name: "output", "decoded", "context" (the input of the output projection), "d_x", or "d_" and a name of torch's.
      shape: of the tensor.
      max_abs: largest difference between the two.
      max_relative: max_abs over the largest entry, for which at least a hundredth of the largest of all gradients is
        used; for a gradient that is 0 up to rounding, as that of a key bias without RoPE, the largest of all.
      cosine: of the angle between the two.
      ours, theirs: largest error of the Flax module and of torch, over the largest entry, against torch in float64.
      worst: index of the largest difference.
      tolerance: limit of `ours`.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    max_relative: float
    cosine: float
    ours: float
    theirs: float
    worst: tuple[int, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance or twice torch's error; NaN never passes."""
        return self.ours <= max(self.tolerance, 2 * self.theirs)


@dataclass(frozen=True)
class Report:
    """All differences, and `errors`: |Flax - torch| of the context, `[N, B * T]`, or None if torch has no context."""

    differences: tuple[Difference, ...]
    errors: np.ndarray | None = None

    @property
    def passed(self) -> bool:
        return all(difference.passed for difference in self.differences)

    @property
    def worst(self) -> Difference:
        """The difference with the largest ratio of error to limit."""
        ratio = lambda x: x.ours / max(x.tolerance, 2 * x.theirs)
        return max(self.differences, key=lambda x: np.inf if np.isnan(x.ours) else ratio(x))

    def table(self) -> str:
        """A line for each tensor."""
        titles = ("tensor", "shape", "max abs", "max relative", "1 - cosine", "ours", "torch", "worst at", "")
        lines: list[Sequence[str]] = [titles]
        for x in self.differences:
            numbers = (f"{n:.1e}" for n in (x.max_abs, x.max_relative, 1 - x.cosine, x.ours, x.theirs))
            shape, worst = (",".join(map(str, n)) for n in (x.shape, x.worst))
            lines.append((x.name, shape, *numbers, worst, "" if x.passed else "FAILED"))
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines)

    def to_json(self) -> str:
        rows = [asdict(x) | {"passed": x.passed} for x in self.differences]
        return json.dumps({"passed": self.passed, "differences": rows}, indent=2)

    def plot(self, path: Path) -> None:
        """A heat map as PNG: the difference of the context by head and row, on a logarithmic scale."""
        if self.errors is None:
            raise ValueError("There is nothing to plot: this torch layer has no single output projection.")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 0.5 + 0.35 * max(4, len(self.errors))), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(np.log10(np.maximum(self.errors, 1e-12)), aspect="auto", cmap="magma")
        axes.set(xlabel="row (batch x position)", ylabel="head", title="|ours - torch| before the output projection")
        figure.colorbar(image, label="log10")
        figure.savefig(path, dpi=120)
