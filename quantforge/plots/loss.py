"""Relative loss over depth: a panel per kind of layer, a line per run; dashes say the width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from quantforge.plots.drawing import (
    DASHES,
    INK,
    LEFT,
    MOST_KINDS,
    MOST_LINES,
    PAPER,
    RIGHT,
    ROW,
    SOFT,
    TITLE,
    WIDE,
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
)

if TYPE_CHECKING:
    from quantforge.record import Run


def loss_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose losses are drawn: all where few, else those of the narrowest width that has several.

    Where these are still too many, the ones with the lowest perplexity.
    """
    found = [run for run in runs if run.bits is not None and _depths(run)]
    if len(found) > MOST_LINES:
        widths = [run.bits for run in found if run.bits is not None]
        narrowest = min([bits for bits in widths if widths.count(bits) > 1] or widths)
        found = [run for run in found if run.bits == narrowest]
    places = sorted(range(len(found)), key=lambda i: found[i].perplexity if drawable(found[i].perplexity) else 1e30)
    return [found[i] for i in sorted(places[:MOST_LINES])]


def loss_kinds(runs: Sequence[Run]) -> list[str]:
    """Return the kinds of layer that `runs` have losses of."""
    return list(dict.fromkeys(kind for run in runs for kind in _depths(run)))


def loss_figure(runs: Sequence[Run], width: float = WIDE) -> Figure:
    """Draw relative loss over depth on a log scale, `width` inches wide: a panel per kind of layer, a line per run."""
    shown = loss_runs(runs)
    kinds = loss_kinds(shown)[:MOST_KINDS]
    with style():
        if not kinds:
            return empty(width, "No loss by layer was recorded.")
        look, dashes = looks(runs), _dashes(shown)
        used = {series(run): look[series(run)] for run in shown}
        handles = [(each.name, mark(each, joined=True)) for each in used.values()]
        widths = sorted({run.bits for run in shown if run.bits is not None}, reverse=True)
        if len(widths) > 1:
            handles += [(_bits(w), Line2D([], [], color=SOFT, linewidth=1.4, linestyle=dashes[w])) for w in widths]
        columns = legend_columns([name for name, _ in handles], width)
        rows = _rows(len(kinds), 4 if width > 7 else 2)
        above, deep = ROW * math.ceil(len(handles) / columns) + 0.15, TITLE + 2.2
        high = above + deep * len(rows) + 0.2
        figure = Figure(figsize=(width, high), facecolor="none")
        first: Axes | None = None
        boxes = [
            (LEFT + i * (width - LEFT - RIGHT + 0.2) / across, high - above - (down + 1) * deep + 0.3,
             (width - LEFT - RIGHT + 0.2) / across - 0.2, deep - TITLE - 0.3)
            for down, across in enumerate(rows) for i in range(across)
        ]  # fmt: skip
        for kind, box in zip(kinds, boxes, strict=True):
            axes = add_axes(figure, box, first)
            first = first or axes
            for place, run in enumerate(shown):
                points = _depths(run).get(kind, [])
                each = look[series(run)]
                axes.plot([x for x, _ in points], [y for _, y in points], color=each.color, marker=each.marker,
                          markersize=4, markeredgecolor=PAPER, markeredgewidth=0.5, linewidth=1.3, clip_on=False,
                          linestyle=dashes[run.bits], markevery=_sparsely(len(points), place))  # fmt: skip
            _finish_panel(axes, kind[:32], leftmost=box[0] == LEFT)
        axes.set_xlabel("block", loc="right", labelpad=1)
        add_legend(figure, handles, columns)
    return figure


def _rows(panels: int, most: int) -> list[int]:
    """Share panels out over rows of at most `most`, so evenly that no row has a hole: its panels fill its width."""
    down = math.ceil(panels / most)
    return [panels // down + (i < panels % down) for i in range(down)]


def _sparsely(points: int, place: int) -> tuple[int, int]:
    """Return where the markers of line number `place` go: on more than 16 points they would hide the lines."""
    step = max(1, points // 6) if points > 16 else 1
    return (2 * place % step, step)


def _depths(run: Run) -> dict[str, list[Point]]:
    """Return the (depth, relative loss) points of each kind; experts, which share a block, by their mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in run.layers:
        if drawable(layer.relative_loss) and (layer.block is None or 0 <= layer.block < 10**6):
            kind = found.setdefault(layer.kind, {})
            kind.setdefault(len(kind) if layer.block is None else layer.block, []).append(layer.relative_loss)
    return {kind: [(x, fmean(ys)) for x, ys in sorted(blocks.items())] for kind, blocks in found.items()}


def _dashes(runs: Sequence[Run]) -> dict[int | None, Any]:
    """Give each width a pattern of dashes; the widest is solid."""
    widths = sorted({run.bits for run in runs if run.bits is not None}, reverse=True)
    return {bits: (0, DASHES[i % len(DASHES)]) if i % len(DASHES) else "-" for i, bits in enumerate(widths)}


def _bits(count: int) -> str:
    return f"{count} bit" if count == 1 else f"{count} bits"


def _finish_panel(axes: Axes, title: str, leftmost: bool) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_share))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(labelleft=leftmost)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=7, parse_math=False)


def _share(value: float, _: int | None) -> str:
    return f"{100 * value:.10g} %" if 9e-6 <= value < 1e4 else f"{value:.0e}"
