"""Tokens a second over the batch size: a panel for prompts and one for generation, a line per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from quantforge.plots.drawing import (
    COLORS,
    INK,
    LEFT,
    MARKERS,
    PAPER,
    RIGHT,
    ROW,
    TITLE,
    WIDE,
    Look,
    Point,
    add_axes,
    add_legend,
    drawable,
    empty,
    legend_columns,
    mark,
    style,
    tick,
)

_HIGH, _GAP = 2.4, 0.75  # inches: a panel, and from one to the next


def speed_figure(panels: Mapping[str, Mapping[str, Sequence[Point]]], width: float = WIDE) -> Figure:
    """Draw `panels`, by title: for each model, by name, its points (batch size, tokens a second), on log scales."""
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    drawn = {
        title: {name: [p for p in points if all(map(drawable, p))] for name, points in lines.items()}
        for title, lines in panels.items()
    }
    with style():
        if not any(points for lines in drawn.values() for points in lines.values()):
            return empty(width, "No speed was measured.")
        looks = {n: Look(n, COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}
        handles: list[tuple[str, Line2D]] = [(look.name[:60], mark(look, joined=True)) for look in looks.values()]
        columns = legend_columns([name for name, _ in handles], width)
        above = ROW * -(-len(handles) // columns) + 0.15
        figure = Figure(figsize=(width, above + TITLE + _HIGH + 0.55), facecolor="none")
        across = (width - LEFT - RIGHT - _GAP * (len(drawn) - 1)) / len(drawn)
        for i, (title, lines) in enumerate(drawn.items()):
            axes = add_axes(figure, (LEFT + i * (across + _GAP), 0.5, across, _HIGH))
            sizes = sorted({x for points in lines.values() for x, _ in points})
            for name, points in lines.items():
                look = looks[name]
                axes.plot([x for x, _ in points], [y for _, y in points], color=look.color, marker=look.marker,
                          markersize=6, markeredgecolor=PAPER, markeredgewidth=0.7, linewidth=1.6,
                          clip_on=False)  # fmt: skip
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.yaxis.set_major_formatter(FuncFormatter(tick))
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=7, parse_math=False)
            axes.set_xlabel("texts side by side", loc="right", labelpad=1)
        add_legend(figure, handles, columns)
    return figure
