"""The plot of a run: loss by tokens trained on, each step and its running mean, as inline SVG in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from quantforge.plots import drawing
from quantforge.plots.drawing import COLORS, SOFT
from quantforge.training.results import Training

HIGH, FOOT, HEAD, LEFT, RIGHT = 2.9, 0.5, 0.3, 0.62, 0.35  # inches
LAG = 0.1  # share of all steps that the running mean looks back over
MOST = 2000  # points of a line; more are not seen


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and those before it, over a tenth of all of them."""
    lag = max(round(LAG * len(values)), 1)
    sums = [0.0, *accumulate(values)]
    return [(sums[i + 1] - sums[max(i + 1 - lag, 0)]) / min(i + 1, lag) for i in range(len(values))]


def figure(run: Training, width: float = drawing.WIDE) -> Figure:
    """Draw the loss of every step, and their running mean, over the tokens trained on."""
    points = [(at, step.loss) for at, step in zip(accumulate(s.tokens for s in run.steps), run.steps, strict=True)]
    points = [point for point in points if math.isfinite(point[1])]
    if len(points) < 2:
        return drawing.empty(width, "Too few steps to draw.")
    means = running_mean([loss for _, loss in points])
    every = -(-len(points) // MOST)
    with drawing.style():
        made = Figure(figsize=(width, HIGH), facecolor="none")
        axes = drawing.add_axes(made, (LEFT, FOOT, width - LEFT - RIGHT, HIGH - FOOT - HEAD))
        tokens = [at / 1000 for at, _ in points]
        axes.plot(tokens[::every], [loss for _, loss in points][::every], color=COLORS[0], linewidth=0.8, alpha=0.4)
        axes.plot(tokens[::every], means[::every], color=COLORS[0], linewidth=1.8)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(drawing.tick))
        axes.set_xlabel("thousand tokens trained on", loc="right", color=SOFT)
        axes.set_title("loss", loc="left", color=SOFT, fontsize=9.5)
    return made
