"""Perplexity against bits per weight: colour and marker say the series, a line joins its widths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator

from quantforge.plots.drawing import (
    LEFT,
    MOST_SERIES,
    PAPER,
    RIGHT,
    ROW,
    SOFT,
    WIDE,
    Key,
    Point,
    add_axes,
    add_legend,
    drawable,
    empty,
    legend_columns,
    looks,
    mark,
    series,
    style,
    tick,
)

if TYPE_CHECKING:
    from quantforge.record import Run


def perplexity_series(runs: Sequence[Run]) -> dict[Key, list[Run]]:
    """Return the runs that the plot of perplexity draws, by series, narrow to wide."""
    found: dict[Key, list[Run]] = {}
    for run in runs:
        if run.bits is not None and drawable(run.perplexity) and 0 < run.bits_per_weight < 1000:
            found.setdefault(series(run), []).append(run)
    first = list(found.items())[:MOST_SERIES]
    return {key: sorted(members, key=lambda run: run.bits_per_weight) for key, members in first}


def perplexity_figure(runs: Sequence[Run], width: float = WIDE) -> Figure:
    """Draw perplexity against bits per weight, `width` inches wide: a mark per run, the float model as a level line.

    The marks of a series that has several widths are joined by a line.
    """
    drawn, look = perplexity_series(runs), looks(runs)
    levels = [run for run in runs if run.bits is None and drawable(run.perplexity)]
    levels = list({run.perplexity: run for run in reversed(levels)}.values())[::-1][:3]  # equal ones once
    with style():
        if not drawn:
            return empty(width, "No perplexity of a quantized model was measured.")
        handles = [(look[key].name, mark(look[key], joined=len(members) > 1)) for key, members in drawn.items()]
        columns = legend_columns([name for name, _ in handles], width)
        above = ROW * math.ceil(len(handles) / columns) + 0.42
        high = above + 0.48 * width**0.5 + 2.4
        figure = Figure(figsize=(width, high), facecolor="none")
        axes = add_axes(figure, (LEFT, 0.5, width - LEFT - RIGHT, high - above - 0.5))
        _set_limits(axes, [(run.bits_per_weight, run.perplexity) for rs in drawn.values() for run in rs], levels)
        for key, members in drawn.items():
            axes.plot([run.bits_per_weight for run in members], [run.perplexity for run in members],
                      color=look[key].color, marker=look[key].marker, markersize=6.5, linewidth=1.6,
                      markeredgecolor=PAPER, markeredgewidth=0.9, zorder=3)  # fmt: skip
        for level in levels:
            axes.axhline(level.perplexity, color=SOFT, linewidth=1.1, dashes=(4, 3), zorder=2)
            axes.annotate(f"{level.label[:32]} {level.perplexity:,.3f}", (0, level.perplexity), (4, -4),
                          xycoords=("axes fraction", "data"), textcoords="offset points", ha="left", va="top",
                          color=SOFT, parse_math=False)  # fmt: skip
        if len(drawn) > 1 and len({_width(run) for members in drawn.values() for run in members}) == 1:
            letters = int(13.6 * ((width - LEFT - RIGHT) / 2 - 0.55))
            _label_column(axes, [(members[0], look[key].name[:letters]) for key, members in drawn.items()])
        axes.set_xlabel("bits per weight", loc="right", labelpad=6)
        figure.text(0.0, 1 - (above - 0.16) / high, "perplexity", color=SOFT)
        add_legend(figure, handles, columns)
    return figure


def _set_limits(axes: Axes, points: list[Point], levels: list[Run]) -> None:
    """Set scales, limits and ticks: half a bit of room at both sides, a log scale where perplexity spreads."""
    xs, ys = [x for x, _ in points], [y for _, y in points] + [level.perplexity for level in levels]
    room = max(0.5, 0.06 * (max(xs) - min(xs)))
    axes.set_xlim(min(xs) - room, max(xs) + room)
    span = max(xs) - min(xs) + 2 * room
    step = 0.25 if span < 1.5 else 0.5 if span < 3.5 else 1
    axes.xaxis.set_major_locator(MultipleLocator(step) if span < 12 else MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 0 else ""))
    if max(ys) / min(ys) > 4:
        axes.set_yscale("log")
        margin = (max(ys) / min(ys)) ** 0.1
        axes.set_ylim(min(ys) / margin, max(ys) * margin)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if max(ys) / min(ys) < 100 else (1,), numticks=9))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.12 * (max(ys) - min(ys)) or 0.05 * max(ys)
        axes.set_ylim(min(ys) - margin, max(ys) + margin)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))


def _width(run: Run) -> str:
    return f"{run.bits_per_weight:.1f}"


def _label_column(axes: Axes, labels: list[tuple[Run, str]]) -> None:
    """Name marks that lie above each other, in turn at the left and the right, moved apart, with a line to the mark."""
    unit = axes.figure.dpi / 72
    spots = [(axes.transData.transform((run.bits_per_weight, run.perplexity))[1] / unit, run, n) for run, n in labels]
    spots.sort(key=lambda spot: spot[0])
    for side, alignment in ((1, "left"), (-1, "right")):
        own = spots[0 if side == 1 else 1 :: 2]
        heights: list[float] = []
        for height, _, _ in own:
            heights.append(max(height, heights[-1] + 11.5) if heights else height)
        lift = fmean(h - spot[0] for h, spot in zip(heights, own, strict=True)) if own else 0
        for height, (y, run, name) in zip(heights, own, strict=True):
            axes.annotate(name, (run.bits_per_weight, run.perplexity), (32 * side, height - lift - y),
                          textcoords="offset points", ha=alignment, va="center", fontsize=9, parse_math=False, zorder=4,
                          arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
                          )  # fmt: skip
