"""Quality against bytes on disk: which runs nothing beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import blended_transform_factory

from quantforge.plots.drawing import (
    COLORS,
    INK,
    LEFT,
    MARKERS,
    MOST_SERIES,
    PAPER,
    RIGHT,
    ROW,
    RULE,
    SOFT,
    WIDE,
    Look,
    add_axes,
    add_legend,
    drawable,
    empty,
    legend_columns,
    style,
    tick,
)

MEGABYTE = 1e6
LETTER = 4.9  # points, of text of size 9
LINE = 11.5  # points from one line of text to the next
STAR = "*"


@dataclass(frozen=True)
class Spot:
    """One run of the plot.

    name     what it is called beside its mark
    color    what its colour says: its series, or of several models its model
    shape    what its marker says: its series, or of several models its method
    size     bytes on disk
    quality  lower is better
    level    whether it is the float model
    """

    name: str
    color: str
    shape: str
    size: float
    quality: float
    level: bool = False


def drawn(spots: Sequence[Spot]) -> list[Spot]:
    """Return the spots that have a place on both axes; of the float models also those whose quality is 0."""
    return [s for s in spots if drawable(s.size) and (drawable(s.quality) or (s.level and s.quality == 0))]


def front(spots: Sequence[Spot]) -> list[Spot]:
    """Return the spots that no other one beats: none is as small and as good, and better in one of the two.

    Small to large. Float models take part.
    """
    found: list[Spot] = []
    for spot in sorted(spots, key=lambda s: (s.size, s.quality)):
        last = found[-1] if found else None
        if last is None or spot.quality < last.quality or (spot.size, spot.quality) == (last.size, last.quality):
            found.append(spot)
    return found


def looks(spots: Sequence[Spot]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the colour of each `color` and the marker of each `shape`, in order of appearance."""
    colors = list(dict.fromkeys(spot.color for spot in spots))
    shapes = list(dict.fromkeys(spot.shape for spot in spots if not spot.level))
    return (
        {name: COLORS[i % len(COLORS)] for i, name in enumerate(colors)},
        {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(shapes)},
    )


def pareto_figure(
    spots: Sequence[Spot],
    quality: str,
    width: float = WIDE,
    colors: dict[str, str] | None = None,
    markers: dict[str, str] | None = None,
) -> Figure:
    """Draw `quality` against bytes, `width` inches wide: the front joined and named, what is dominated in grey.

    colors, markers  of each spot's `color` and `shape`, to be those of another plot; else `looks` chooses
    """
    shown = drawn(spots)
    chosen = looks(spots)
    colors, markers = colors or chosen[0], markers or chosen[1]
    with style():
        if not any(not spot.level for spot in shown):
            return empty(width, "No size and quality of a quantized model were measured.")
        handles = _handles(shown, colors, markers)
        columns = legend_columns([name for name, _ in handles], width)
        above = ROW * math.ceil(len(handles) / columns) + 0.42
        high = above + 0.48 * width**0.5 + 2.5
        figure = Figure(figsize=(width, high), facecolor="none")
        axes = add_axes(figure, (LEFT, 0.5, width - LEFT - RIGHT, high - above - 0.5))
        best = front(shown)
        _set_limits(axes, shown, width - LEFT - RIGHT)
        steps = [spot for spot in best if spot.quality > 0]
        axes.plot([s.size / MEGABYTE for s in steps], [s.quality for s in steps], color=SOFT, linewidth=1.1,
                  drawstyle="steps-post", zorder=2)  # fmt: skip
        for spot in shown:
            _draw(axes, spot, spot in best, colors[spot.color], markers.get(spot.shape, STAR))
        _name(axes, [spot for spot in shown if spot.quality > 0], best)
        axes.set_xlabel("megabytes on disk", loc="right", labelpad=6)
        figure.text(0.0, 1 - (above - 0.16) / high, quality, color=SOFT)
        add_legend(figure, handles, columns)
    return figure


def _handles(shown: Sequence[Spot], colors: dict[str, str], markers: dict[str, str]) -> list[tuple[str, Line2D]]:
    """Return the entries of the legend: a series each, or where colour is the model, models and then methods."""
    own = [spot for spot in shown if not spot.level]
    series = list(dict.fromkeys((spot.color, spot.shape) for spot in own))[:MOST_SERIES]
    if all(color == shape for color, shape in series):
        found = [(color[:36], _entry(colors[color], markers[shape])) for color, shape in series]
    else:
        models, methods = (list(dict.fromkeys(part)) for part in zip(*((s.color, s.shape) for s in own), strict=True))
        models = list(dict.fromkeys([*models, *(spot.color for spot in shown)]))
        found = [(model[:36], Line2D([], [], color=colors[model], linewidth=5)) for model in models]
        found += [(method[:36], _entry(SOFT, markers[method])) for method in methods[:MOST_SERIES]]
    if any(spot.level for spot in shown):
        found.append(("float model", Line2D([], [], color=INK, marker=STAR, markersize=9, linestyle="")))
    if len(front(shown)) < len(shown):
        grey = Line2D([], [], color=RULE, marker="o", markersize=6, linestyle="", markeredgecolor=SOFT)
        found.append(("beaten in both", grey))
    return found


def _entry(color: str, marker: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, markersize=6.5, linestyle="", markeredgecolor=PAPER,
                  markeredgewidth=0.7)  # fmt: skip


def _draw(axes: Axes, spot: Spot, best: bool, color: str, marker: str) -> None:
    size = spot.size / MEGABYTE
    if spot.level and spot.quality == 0:  # its divergence from itself has no place on a log scale
        axes.axvline(size, color=color, linewidth=1.1, dashes=(4, 3), zorder=1)
        place = blended_transform_factory(axes.transData, axes.transAxes)
        axes.annotate(_short(spot.name), (size, 1.0), (-4, -4), xycoords=place, textcoords="offset points", ha="right",
                      va="top", color=SOFT, fontsize=9, parse_math=False)  # fmt: skip
        return
    axes.plot([size], [spot.quality], marker=STAR if spot.level else marker, markersize=11 if spot.level else 7.5,
              color=color if best or spot.level else RULE, linestyle="",
              markeredgecolor=PAPER if best or spot.level else color, markeredgewidth=0.9,
              zorder=4 if best else 3)  # fmt: skip


def _short(name: str, letters: int = 34) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _set_limits(axes: Axes, shown: Sequence[Spot], inches: float) -> None:
    """Set scales, limits and ticks, with room at the left and below for the names of the front."""
    xs = [spot.size / MEGABYTE for spot in shown]
    ys = [spot.quality for spot in shown if spot.quality > 0]
    room = min(0.42, (LETTER * max(len(_short(spot.name)) for spot in shown) + 14) / 72 / inches)  # of the axis
    _limit(axes, "x", xs, room, 0.05)
    _limit(axes, "y", ys, 0.16, 0.08)
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))


def _limit(axes: Axes, side: str, values: Sequence[float], before: float, after: float) -> None:
    """Leave the shares `before` and `after` of the axis free; a log scale where values spread."""
    axis = axes.xaxis if side == "x" else axes.yaxis
    low, high = min(values), max(values)
    log = high / low > 3
    a, b = (math.log(low), math.log(high)) if log else (low, high)
    span = (b - a) / (1 - before - after) or (0.2 if log else 0.2 * high)
    ends = a - before * span, b + after * span
    if log:
        ends = math.exp(ends[0]), math.exp(ends[1])
        (axes.set_xscale if side == "x" else axes.set_yscale)("log")
        spread = ends[1] / ends[0]
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if spread < 100 else (1,), numticks=9))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    (axes.set_xlim if side == "x" else axes.set_ylim)(*ends)


def _name(axes: Axes, shown: Sequence[Spot], best: Sequence[Spot]) -> None:
    """Name the front at its lower left, where nothing lies that it does not beat, and other float models at the right.

    Names that would hide a mark or another name move down, with a line to their mark.
    """
    unit = axes.figure.dpi / 72
    places = [(axes.transData.transform((spot.size / MEGABYTE, spot.quality)) / unit, spot) for spot in shown]
    edge = axes.transAxes.transform((1, 0))[0] / unit
    taken = [(x - 5, x + 5, y) for (x, y), _ in places]  # left, right, middle of what is there, points
    for (x, y), spot in sorted(places, key=lambda place: -place[0][1]):
        if spot not in best and not spot.level:
            continue
        name, before = _short(spot.name), spot in best
        width = LETTER * len(name)
        before = before or x + 8 + width > edge
        left = x - 8 - width if before else x + 8
        middle = y - 9 if before else y
        for _ in range(len(taken)):
            clash = [m for a, b, m in taken if a < left + width and left < b and abs(m - middle) < LINE]
            if not clash or (not before and clash == [y]):
                break
            middle = min(clash) - LINE
        taken.append((left, left + width, middle))
        line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            name, (spot.size / MEGABYTE, spot.quality), (-8 if before else 8, middle - y), textcoords="offset points",
            ha="right" if before else "left", va="center", fontsize=9, parse_math=False, zorder=5, color=INK,
            arrowprops=line if y - middle > 1.5 * LINE else None,
        )  # fmt: skip


def look_of(spots: Sequence[Spot], chosen: dict[str, Look]) -> tuple[dict[str, str], dict[str, str]]:
    """Return colours and markers by name as another plot has them, `chosen`; those it lacks are of the ink."""
    return (
        {spot.color: chosen[spot.color].color if spot.color in chosen else INK for spot in spots},
        {spot.shape: chosen[spot.shape].marker if spot.shape in chosen else STAR for spot in spots},
    )
