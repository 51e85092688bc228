"""How the values of a layer's weights or inputs are spread: before as an outline, after filled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from quantforge.plots.drawing import COLORS, INK, add_axes, drawable, empty, style, tick

if TYPE_CHECKING:
    from quantforge.record import Histogram

WIDTH, HEIGHT = 3.4, 2.0  # inches
MOST_BINS = 2000
LEAST = 1e-7  # the smallest share that is drawn


def histogram_figure(histogram: Histogram) -> Figure:
    """Draw the share of the values in each bin, on a log scale, before (outline) and after (filled)."""
    before, after = _shares(histogram.before), _shares(histogram.after)
    with style():
        if not (before or after) or not drawable(histogram.edge):
            return empty(WIDTH, "No values were counted.")
        floor, top = _limits([*before, *after])
        figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="none")
        axes = add_axes(figure, (0.5, 0.28, WIDTH - 0.68, HEIGHT - 0.36))
        axes.set_yscale("log")
        axes.set_ylim(floor, top)
        axes.set_xlim(-histogram.edge, histogram.edge)
        if after:
            axes.stairs([max(share, floor) for share in after], _edges(histogram.edge, len(after)), baseline=floor,
                        fill=True, color=COLORS[1], alpha=0.55, linewidth=0)  # fmt: skip
        if before:
            axes.stairs([max(share, floor) for share in before], _edges(histogram.edge, len(before)), baseline=None,
                        color=INK, linewidth=0.9)  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x, None).replace("-", "−") if x else "0"))
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(_share))
    return figure


def _shares(values: Sequence[float]) -> list[float]:
    """Return the shares with all that is no share as 0; nothing if there are too many to draw, or only zeros."""
    found = [value if math.isfinite(value) and 0 < value <= 1 else 0.0 for value in values]
    return found if any(found) and len(found) <= MOST_BINS else []


def _limits(shares: Sequence[float]) -> tuple[float, float]:
    some = [share for share in shares if share > 0]
    floor = 10 ** math.floor(math.log10(max(LEAST, min(some))))
    return floor, max(2 * max(some), 10 * floor)


def _edges(edge: float, bins: int) -> list[float]:
    return [edge * (2 * i / bins - 1) for i in range(bins + 1)]


def _share(value: float, _: int | None) -> str:
    power = round(math.log10(value))
    return "1" if power == 0 else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
