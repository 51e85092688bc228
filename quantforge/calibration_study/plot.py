"""The plot of a study: perplexity of every cell, each seed a dot, as inline SVG in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from quantforge.calibration_study.results import Study
from quantforge.calibration_study.spread import CellResult, cells
from quantforge.errors import clean
from quantforge.plots import drawing
from quantforge.plots.drawing import COLORS, INK, SOFT

ROW, HEAD, FOOT = 0.27, 0.25, 0.55  # inches: a row, the room above and below
LABELS, RIGHT = 1.25, 0.3  # inches left and right of the axes
MOST_ROWS = 200
LETTERS = 44


def drawn(study: Study) -> list[CellResult]:
    """Return the cells that the plot draws: those whose perplexities are finite, the first of very many."""
    return [result for result in cells(study) if math.isfinite(result.perplexity.mean)][:MOST_ROWS]


def level(study: Study) -> float | None:
    """Return the float model's perplexity if it is drawn: None if it lies so far off that dots would run together."""
    values = [run.perplexity for result in drawn(study) for run in result.runs]
    losses = study.float_losses
    if not values or not losses or not math.isfinite(sum(losses)):
        return None
    found = math.exp(min(math.fsum(losses) / len(losses), 700))
    return found if found > min(values) - 1.5 * (max(values) - min(values)) else None


def figure(study: Study, width: float = drawing.WIDE) -> Figure:
    """Draw a row for each cell, under the name of its set: a dot for each seed, a bar at their mean."""
    rows = _rows(drawn(study))
    if not rows:
        return drawing.empty(width, "No perplexity was measured.")
    with drawing.style():
        high = HEAD + ROW * len(rows) + FOOT
        made = Figure(figsize=(width, high), facecolor="none")
        axes = drawing.add_axes(made, (LABELS, FOOT, width - LABELS - RIGHT, high - HEAD - FOOT))
        _dress(axes, len(rows))
        names = list(dict.fromkeys(row for row in rows if isinstance(row, str)))
        color = INK
        for place, row in enumerate(rows):
            if isinstance(row, str):
                color = COLORS[names.index(row) % len(COLORS)]
                axes.annotate(clean(row)[:LETTERS], (0, place), (-60, 0), xycoords=("axes fraction", "data"),
                              textcoords="offset points", va="center", fontweight="bold", parse_math=False,
                              annotation_clip=False)  # fmt: skip
            else:
                _draw_row(axes, place, row, color)
        found = level(study)
        if found is not None:
            axes.axvline(found, color=SOFT, linewidth=1.1, dashes=(4, 3), zorder=2)
            axes.annotate(f"float {found:,.3f}", (found, 1), (3, 3), xycoords=("data", "axes fraction"),
                          textcoords="offset points", color=SOFT)  # fmt: skip
        axes.set_xlabel("perplexity", loc="right", labelpad=4, color=SOFT)
    return made


def _rows(results: Sequence[CellResult]) -> list[str | CellResult]:
    """Return what each row holds from the top: the name of a set, then its cells."""
    found: list[str | CellResult] = []
    for result in results:
        if result.cell.data not in found:
            found.append(result.cell.data)
        found.append(result)
    return found


def _draw_row(axes: Axes, place: int, result: CellResult, color: str) -> None:
    axes.plot([run.perplexity for run in result.runs], [place] * len(result.runs), linestyle="", marker="o",
              markersize=6, color=color, alpha=0.75, markeredgewidth=0, zorder=3, clip_on=False)  # fmt: skip
    axes.plot([result.perplexity.mean], [place], marker="|", markersize=13, markeredgewidth=1.8, color=INK, zorder=4)
    axes.annotate(f"{result.cell.samples} × {result.cell.seq_len}", (0, place), (-8, 0),
                  xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="center", color=SOFT,
                  annotation_clip=False)  # fmt: skip


def _dress(axes: Axes, rows: int) -> None:
    """Set the axes up: rows from the top down, and a grid of perplexities."""
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    axes.margins(x=0.06)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(drawing.tick))
