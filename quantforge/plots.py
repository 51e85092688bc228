"""The two plots of the report as inline SVG: perplexity over bits per weight, and loss over depth.

Figures are drawn in the light palette; `svg` turns each of its colours into the CSS variable of the page, so that one
drawing serves light and dark. Text stays text, in the page's font; names must be free of control characters.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from statistics import fmean
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from quantforge.record import Run

PALETTE = {
    "#fcfbf9": "--paper", "#22252b": "--ink", "#656a73": "--soft", "#dedad2": "--rule", "#e9e6df": "--grid",
    "#2f6296": "--c1", "#bb5420": "--c2", "#1f7f6c": "--c3", "#80509c": "--c4", "#917000": "--c5", "#b0486f": "--c6",
}  # fmt: skip
PAPER, INK, SOFT, RULE, GRID, *COLORS = PALETTE
MARKERS = "osD^vPX"  # seven, against six colours: a pair of both repeats only after 42 methods
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.2, 1.4), (6, 1.5, 1.2, 1.5), (9, 2), (2.5, 2.5))
WIDTH = 9.6  # inches; 72 units of the drawing each
MOST_RUNS, MOST_KINDS = 24, 12  # more cannot be told apart

Point = tuple[float, float]


@contextmanager
def _style() -> Iterator[None]:
    """Draw with matplotlib's own defaults and these few changes, whatever the user's configuration says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the font, measuring needs none
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({
            "svg.fonttype": "none", "svg.hashsalt": "quantforge", "font.size": 9.5, "text.color": INK,
            "axes.edgecolor": RULE, "axes.labelcolor": SOFT, "axes.linewidth": 0.8, "axes.facecolor": "none",
            "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
            "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.8,
            "xtick.color": RULE, "xtick.labelcolor": SOFT, "xtick.major.size": 3, "xtick.minor.size": 0,
            "ytick.labelcolor": SOFT, "ytick.major.size": 0, "ytick.minor.size": 0, "lines.solid_capstyle": "round",
        })  # fmt: skip
        yield


def perplexity_figure(runs: Sequence[Run]) -> Figure:
    """Draw perplexity against bits per weight: a line per method over its widths, the float model as a level line."""
    shown = [r for r in runs if _drawable(r.perplexity)]
    levels = [r for r in shown if r.bits is None][:3]
    series = _series(r for r in shown if r.bits is not None and 0 < r.bits_per_weight < 1000)
    with _style():
        figure = Figure(figsize=(WIDTH, 4.7), facecolor="none")
        axes = figure.add_axes((0.065, 0.115, 0.915, 0.80))
        if not series:
            return _empty(figure, axes, "No perplexity of a quantized model was measured.")
        _set_limits(
            axes,
            [(r.bits_per_weight, r.perplexity) for rs in series.values() for r in rs],
            levels,
            max(map(len, series)),
        )
        colors = _by_method(runs)
        labels = []
        for name, members in series.items():
            color, marker = colors[members[0].method]
            points = [(r.bits_per_weight, r.perplexity) for r in members]
            axes.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=6.5, linewidth=1.8,
                      markeredgecolor=PAPER, markeredgewidth=1.1, zorder=3)  # fmt: skip
            labels.append((points[0], name, color))
        for level in levels:
            axes.axhline(level.perplexity, color=SOFT, linewidth=1.1, dashes=(4, 3), zorder=2)
            axes.annotate(f"{level.label[:32]} {level.perplexity:,.3f}", (1, level.perplexity), (0, -4),
                          xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", va="top",
                          color=SOFT, parse_math=False)  # fmt: skip
        _label_beside(axes, labels)
        axes.set_xlabel("bits per weight", loc="right", labelpad=6)
        axes.text(-0.07, 1.035, "perplexity", transform=axes.transAxes, color=SOFT)
    return figure


def _drawable(value: float) -> bool:
    return 1e-30 < value < 1e30  # the limits leave room for margins on a log scale


def _series(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs that differ in width alone, narrow to wide, under the shortest name that tells the groups apart."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in list(runs)[:MOST_RUNS]:
        rest = re.sub(rf"(?<!\d){run.bits}(?!\d)", "", run.label, count=1)
        groups.setdefault((run.method, rest), []).append(run)
    methods = [method for method, _ in groups]
    names: dict[str, list[Run]] = {}
    for (method, rest), members in groups.items():
        alone = methods.count(method) == 1
        name = (method if alone else members[0].label if len(members) == 1 else rest)[:32]
        names.setdefault(name, []).extend(members)
    return {name: sorted(members, key=lambda r: r.bits_per_weight) for name, members in names.items()}


def _by_method(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Give each method that quantizes a colour and a marker, in order of appearance."""
    methods = list(dict.fromkeys(run.method for run in runs if run.bits is not None))
    return {m: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}


def _set_limits(axes: Axes, points: list[Point], levels: list[Run], letters: int) -> None:
    """Set scales and limits, with room at the left for labels of so many letters."""
    xs, ys = [x for x, _ in points], [y for _, y in points] + [level.perplexity for level in levels]
    span = max(max(xs) - min(xs), 0.5)
    room = min(0.4, 0.04 + 0.0095 * letters)
    axes.set_xlim(min(xs) - span * room / (1 - room), max(xs) + 0.06 * span)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
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
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: int | None) -> str:
    return f"{value:,.10g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.0e}"


def _label_beside(axes: Axes, labels: list[tuple[Point, str, str]]) -> None:
    """Write each label to the left of its point, moved up where it would lie on another."""
    height = 13.5 * axes.figure.dpi / 72
    placed: list[Point] = []
    for (x, y), name, color in sorted(labels, key=lambda item: item[0][1]):
        right, wanted = axes.transData.transform((x, y))
        near = [top for end, top in placed if abs(end - right) < 8 * height]
        center = max([wanted, *(top + height for top in near)])
        placed.append((right, center))
        axes.annotate(name, (x, y), (-9, (center - wanted) * 72 / axes.figure.dpi), textcoords="offset points",
                      ha="right", va="center", color=color, fontsize=10, fontweight="bold", parse_math=False,
                      zorder=4)  # fmt: skip


def loss_figure(runs: Sequence[Run]) -> Figure:
    """Draw relative loss over depth on a log scale: a panel per kind of layer, a line per run."""
    shown = [run for run in runs if _depths(run)][:MOST_RUNS]
    kinds = list(dict.fromkeys(kind for run in shown for kind in _depths(run)))[:MOST_KINDS]
    across = len(kinds) if 0 < len(kinds) <= 4 else min((4, 3), key=lambda n: -len(kinds) % n)  # the fewest gaps
    down = max(1, math.ceil(len(kinds) / across))
    with _style():
        legend = 0.3 + 0.24 * math.ceil(len(shown) / 4)
        high = legend + 2.5 * down + 0.3
        figure = Figure(figsize=(WIDTH, high if kinds else 1.6), facecolor="none")
        if not kinds:
            return _empty(figure, figure.add_axes((0.05, 0.1, 0.9, 0.8)), "No loss by layer was recorded.")
        panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat
        figure.subplots_adjust(0.065, 0.42 / high, 0.985, 1 - (legend + 0.25) / high, wspace=0.09, hspace=0.26)
        colors, dashes = _by_method(runs), _by_width(shown)
        drawn = zip(panels, [*kinds, *[None] * (down * across - len(kinds))], strict=True)
        for place, (axes, kind) in enumerate(drawn):
            if kind is None:
                axes.set_visible(False)
                continue
            for run in shown:
                points = _depths(run).get(kind, [])
                axes.plot([x for x, _ in points], [y for _, y in points], **_line(run, colors, dashes), clip_on=False)
            _finish_panel(axes, kind[:32], last=place + across >= len(kinds))
        _legend(figure, shown, [Line2D([], [], **_line(run, colors, dashes)) for run in shown])
    return figure


def _depths(run: Run) -> dict[str, list[Point]]:
    """Return the (depth, relative loss) points of each kind; experts, which share a block, by their mean."""
    found: dict[str, dict[int, list[float]]] = {}
    for layer in run.layers:
        if _drawable(layer.relative_loss) and (layer.block is None or 0 <= layer.block < 10**6):
            kind = found.setdefault(layer.kind, {})
            kind.setdefault(len(kind) if layer.block is None else layer.block, []).append(layer.relative_loss)
    return {kind: [(x, fmean(ys)) for x, ys in sorted(blocks.items())] for kind, blocks in found.items()}


def _by_width(runs: Sequence[Run]) -> dict[str, tuple[float, ...]]:
    """Give each number of bits per weight, as `_width` writes it, a dash pattern; the widest gets a solid line."""
    widths = dict.fromkeys(map(_width, sorted(runs, key=lambda run: -run.bits_per_weight)))
    return {width: DASHES[i % len(DASHES)] for i, width in enumerate(widths)}


def _width(run: Run) -> str:
    return f"{run.bits_per_weight:.3f}"  # the group size shows too, which `bits` does not tell


def _line(run: Run, colors: dict[str, tuple[str, str]], dashes: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Return how the line of `run` looks: colour and marker say the method, dashes the bits per weight."""
    color, marker = colors.get(run.method, (SOFT, "o"))
    pattern = dashes[_width(run)]
    sparse = max(map(len, _depths(run).values())) <= 16  # on more blocks markers hide the lines
    return {
        "color": color, "marker": marker if sparse else "", "markersize": 4, "markeredgecolor": PAPER,
        "markeredgewidth": 0.6, "linewidth": 1.4, "linestyle": (0, pattern) if pattern else "-",
    }  # fmt: skip


def _finish_panel(axes: Axes, title: str, last: bool) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_share))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.tick_params(labelbottom=last)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK, pad=7, parse_math=False)
    if last:
        axes.set_xlabel("block", loc="right", labelpad=2)


def _share(value: float, _: int | None) -> str:
    return f"{100 * value:.10g} %" if 1e-6 <= value < 1e4 else f"{value:.0e}"


def _legend(figure: Figure, runs: Sequence[Run], lines: list[Line2D]) -> None:
    legend = figure.legend(lines, ["-"] * len(runs), loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=4,
                           frameon=False, handlelength=2.8, columnspacing=2.0, borderpad=0.1)  # fmt: skip
    for text, run in zip(legend.get_texts(), runs, strict=True):  # set afterwards: a label "_x" would hide the entry
        text.set_parse_math(False)
        text.set_text(run.label[:36])


def _empty(figure: Figure, axes: Axes, message: str) -> Figure:
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=SOFT)
    return figure


def svg(figure: Figure, name: str) -> str:
    """Return `figure` as an SVG element to be put inside HTML, its ids led by `name`, its colours those of the page.

    The same figure gives the same text: ids are hashes of what they name, and neither date nor version is written.
    """
    file = StringIO()
    with _style():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', file.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib = {k: _for_page(k, v, name) for k, v in attributes.items() if k != "id" or v in used}
        for definitions in element.findall("{*}defs"):
            for style in definitions.findall("{*}style"):  # its rule for "*" would be one for the whole page
                definitions.remove(style)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-label", f"Plot of {name}")
    ElementTree.indent(root, "")
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _for_page(key: str, value: str, name: str) -> str:
    """Return an attribute of the drawing for the page: ids with their prefix, colours as variables, no font family."""
    if key == "id":
        return f"{name}-{value}"
    if key in ("href", "clip-path"):
        return re.sub(r"(^|\()#", rf"\1#{name}-", value)
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda hit: f"var({PALETTE[hit[0]]})" if hit[0] in PALETTE else hit[0], value)
        return re.sub(r"font-family: [^;]*(; )?", "", value)
    return value
