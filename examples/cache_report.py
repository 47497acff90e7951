"""The report of `cache_formats.py`: tables, texts side by side, and a picture of the errors."""

import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import matplotlib.ticker
from tokens import Text
from train_report import aligned

WIDTH = 27  # of a column of text


class LayerError(NamedTuple):
    """Errors of one layer's attention: largest difference / largest entry, RMS of the difference / RMS."""

    largest: float
    rms: float


@dataclass(frozen=True)
class Result:
    """The measurements with one cache."""

    cache_dtype: str
    bytes_per_token: int
    perplexity: float
    answers: list[list[int]]  # tokens after each prompt
    errors: list[LayerError]  # of each layer; none of float32


def table(results: list[Result]) -> str:
    float32, bfloat16 = results[:2]
    header = ["cache", "bytes/token", "of bfloat16", "perplexity", "change", "same tokens", "largest error of a layer"]
    rows = [
        [
            result.cache_dtype,
            f"{result.bytes_per_token:,}",
            f"{result.bytes_per_token / bfloat16.bytes_per_token:.1%}",
            f"{result.perplexity:.3f}",
            f"{result.perplexity / float32.perplexity - 1:+.2%}",
            ", ".join(f"{agreement(*pair)} of {len(pair[1])}" for pair in zip(result.answers, float32.answers)),
            worst(result.errors),
        ]
        for result in results
    ]
    return aligned([header, *rows])


def worst(errors: list[LayerError]) -> str:
    if not errors:
        return ""
    return f"{max(error.largest for error in errors):.2%} (RMS {max(error.rms for error in errors):.2%})"


def error_table(results: list[Result]) -> str:
    header = ["layer", *(f"{result.cache_dtype} {part}" for result in results for part in LayerError._fields)]
    layers = zip(*(result.errors for result in results))
    rows = [[f"{i}", *(f"{x:.3%}" for error in errors for x in error)] for i, errors in enumerate(layers)]
    return aligned([header, *rows])


def side_by_side(results: list[Result], text: Text, prompt: int) -> str:
    columns = [
        [f"-- {result.cache_dtype} --", *textwrap.wrap(text.decode(result.answers[prompt]), WIDTH)]
        for result in results
    ]
    lines = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(cell.ljust(WIDTH) for cell in line).rstrip() for line in lines)


def save_plot(results: list[Result], path: Path) -> None:
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained")  # not pyplot, which may need a display
    axes = figure.subplots()
    for result, marker in zip(results, "^os"):
        largest, rms = zip(*result.errors)
        (line,) = axes.plot(rms, marker, linestyle="-", label=f"{result.cache_dtype}, root mean square")
        axes.plot(largest, "--", color=line.get_color(), label=f"{result.cache_dtype}, largest")
    axes.set(yscale="log", xlabel="layer", ylabel="relative error", title="Attention output, against a float32 cache")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(xmax=1))
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def agreement(tokens: list[int], others: list[int]) -> int:
    """The number of equal tokens before the first difference."""
    return sum(itertools.takewhile(bool, (token == other for token, other in zip(tokens, others))))
