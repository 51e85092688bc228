"""The two plots of the report as inline SVG: perplexity over bits per weight, and loss over depth.

In both, colour and marker say the series (a method with its format but for the width) and dashes say the width; each
plot has a wide and a narrow drawing, for screens and phones. Figures are drawn in the light palette; `svg` turns each
of its colours into the CSS variable of the page, so that one drawing serves light and dark. Text stays text, in the
page's font; names must be free of control characters.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from statistics import fmean
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator

if TYPE_CHECKING:
    from quantforge.record import Run

PALETTE = {
    "#fcfbf9": "--paper", "#22252b": "--ink", "#656a73": "--soft", "#dedad2": "--rule", "#e9e6df": "--grid",
    "#2f6296": "--c1", "#bb5420": "--c2", "#1f7f6c": "--c3", "#80509c": "--c4", "#917000": "--c5", "#b0486f": "--c6",
}  # fmt: skip
PAPER, INK, SOFT, RULE, GRID, *COLORS = PALETTE
MARKERS = "osD^vPX"  # seven, against six colours: a pair of both repeats only after 42 series
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.2, 1.4), (6, 1.5, 1.2, 1.5), (9, 2), (2.5, 2.5))
WIDE, NARROW = 9.6, 4.9  # inches; 72 units of the drawing each
LEFT, RIGHT, ROW, TITLE = 0.62, 0.14, 0.23, 0.36  # inches: margins, a row of the legend, room above a panel
MOST_SERIES, MOST_LINES, MOST_KINDS = 42, 8, 12  # more cannot be told apart

Key = tuple[str, str]
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


@dataclass(frozen=True)
class Look:
    """How a series is drawn, the same in both plots."""

    name: str
    color: str
    marker: str


def series(run: Run) -> Key:
    """Return what runs share that differ in width alone: the method, and the label without the width."""
    rest = run.label.removeprefix(run.method)  # whose name may hold the same number
    return run.method, run.label[: len(run.label) - len(rest)] + re.sub(rf"(?<!\d){run.bits}(?!\d)", "", rest, count=1)


def looks(runs: Sequence[Run]) -> dict[Key, Look]:
    """Give each series of the quantized `runs` a colour, a marker and the shortest name that tells it from others."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        if run.bits is not None:
            groups.setdefault(series(run), []).append(run)
    methods = [method for method, _ in groups]
    found = {}
    for i, ((method, rest), members) in enumerate(groups.items()):
        name = method if methods.count(method) == 1 else members[0].label if len(members) == 1 else rest
        found[method, rest] = Look(name[:36], COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
    return found


def perplexity_series(runs: Sequence[Run]) -> dict[Key, list[Run]]:
    """Return the runs that the plot of perplexity draws, by series, narrow to wide."""
    found: dict[Key, list[Run]] = {}
    for run in runs:
        if run.bits is not None and _drawable(run.perplexity) and 0 < run.bits_per_weight < 1000:
            found.setdefault(series(run), []).append(run)
    first = list(found.items())[:MOST_SERIES]
    return {key: sorted(members, key=lambda run: run.bits_per_weight) for key, members in first}


def perplexity_figure(runs: Sequence[Run], width: float = WIDE) -> Figure:
    """Draw perplexity against bits per weight, `width` inches wide: a mark per run, the float model as a level line.

    The marks of a series that has several widths are joined by a line.
    """
    drawn, look = perplexity_series(runs), looks(runs)
    levels = [run for run in runs if run.bits is None and _drawable(run.perplexity)][:3]
    with _style():
        if not drawn:
            return _empty(width, "No perplexity of a quantized model was measured.")
        handles = [(look[key].name, _mark(look[key], joined=len(members) > 1)) for key, members in drawn.items()]
        columns = _columns([name for name, _ in handles], width)
        above = ROW * math.ceil(len(handles) / columns) + 0.42
        high = above + 0.48 * width**0.5 + 2.4
        figure = Figure(figsize=(width, high), facecolor="none")
        axes = _axes(figure, (LEFT, 0.5, width - LEFT - RIGHT, high - above - 0.5))
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
        _legend(figure, handles, columns)
    return figure


def _drawable(value: float) -> bool:
    return 1e-30 < value < 1e30  # the limits leave room for margins on a log scale


def _mark(look: Look, joined: bool) -> Line2D:
    return Line2D([], [], color=look.color, marker=look.marker, markersize=6, markeredgecolor=PAPER,
                  markeredgewidth=0.7, linewidth=1.6, linestyle="-" if joined else "")  # fmt: skip


def _axes(figure: Figure, box: tuple[float, float, float, float], shared: Axes | None = None) -> Axes:
    """Add axes at (left, bottom, width, height) in inches, with the scales of `shared`."""
    wide, high = figure.get_size_inches()
    left, bottom, width, height = box
    place = (left / wide, bottom / high, width / wide, height / high)
    return figure.add_axes(place, sharex=shared, sharey=shared)


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
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


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


def _tick(value: float, _: int | None) -> str:
    return f"{value:,.10g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.0e}"


def loss_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose losses are drawn: all where few, else those of the narrowest width that has several.

    Where these are still too many, the ones with the lowest perplexity.
    """
    found = [run for run in runs if run.bits is not None and _depths(run)]
    if len(found) > MOST_LINES:
        widths = [run.bits for run in found if run.bits is not None]
        narrowest = min([bits for bits in widths if widths.count(bits) > 1] or widths)
        found = [run for run in found if run.bits == narrowest]
    places = sorted(range(len(found)), key=lambda i: found[i].perplexity if _drawable(found[i].perplexity) else 1e30)
    return [found[i] for i in sorted(places[:MOST_LINES])]


def loss_kinds(runs: Sequence[Run]) -> list[str]:
    """Return the kinds of layer that `runs` have losses of."""
    return list(dict.fromkeys(kind for run in runs for kind in _depths(run)))


def loss_figure(runs: Sequence[Run], width: float = WIDE) -> Figure:
    """Draw relative loss over depth on a log scale, `width` inches wide: a panel per kind of layer, a line per run."""
    shown = loss_runs(runs)
    kinds = loss_kinds(shown)[:MOST_KINDS]
    with _style():
        if not kinds:
            return _empty(width, "No loss by layer was recorded.")
        look, dashes = looks(runs), _dashes(shown)
        used = {series(run): look[series(run)] for run in shown}
        handles = [(each.name, _mark(each, joined=True)) for each in used.values()]
        widths = sorted({run.bits for run in shown if run.bits is not None}, reverse=True)
        if len(widths) > 1:
            handles += [(_bits(w), Line2D([], [], color=SOFT, linewidth=1.4, linestyle=dashes[w])) for w in widths]
        columns = _columns([name for name, _ in handles], width)
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
            axes = _axes(figure, box, first)
            first = first or axes
            for place, run in enumerate(shown):
                points = _depths(run).get(kind, [])
                each = look[series(run)]
                axes.plot([x for x, _ in points], [y for _, y in points], color=each.color, marker=each.marker,
                          markersize=4, markeredgecolor=PAPER, markeredgewidth=0.5, linewidth=1.3, clip_on=False,
                          linestyle=dashes[run.bits], markevery=_sparsely(len(points), place))  # fmt: skip
            _finish_panel(axes, kind[:32], leftmost=box[0] == LEFT)
        axes.set_xlabel("block", loc="right", labelpad=1)
        _legend(figure, handles, columns)
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
        if _drawable(layer.relative_loss) and (layer.block is None or 0 <= layer.block < 10**6):
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
    return f"{100 * value:.10g} %" if 1e-6 <= value < 1e4 else f"{value:.0e}"


def _columns(names: list[str], width: float) -> int:
    """Return how many columns a legend of these names has in a figure of `width` inches."""
    most = max(1, int(width / (0.66 + 0.078 * max(map(len, names)))))
    rows = math.ceil(len(names) / most)
    return math.ceil(len(names) / rows)


def _legend(figure: Figure, handles: list[tuple[str, Line2D]], columns: int) -> None:
    legend = figure.legend([line for _, line in handles], ["-"] * len(handles), loc="upper left", ncols=columns,
                           bbox_to_anchor=(0.0, 1.0), frameon=False, handlelength=2.6, columnspacing=1.6,
                           borderpad=0.1, labelspacing=0.45, borderaxespad=0.1)  # fmt: skip
    for text, (name, _) in zip(legend.get_texts(), handles, strict=True):  # set afterwards: "_x" would hide the entry
        text.set_parse_math(False)
        text.set_text(name)


def _empty(width: float, message: str) -> Figure:
    figure = Figure(figsize=(width, 1.6), facecolor="none")
    axes = figure.add_axes((0.05, 0.1, 0.9, 0.8))
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, transform=axes.transAxes, ha="center", va="center", color=SOFT)
    return figure


def svg(figure: Figure, name: str, about: str = "") -> str:
    """Return `figure` as an SVG element to be put inside HTML, its ids led by `name`, its colours those of the page.

    `about` is what it is called where it is not seen.

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
    root.set("aria-label", about or f"Plot of {name}")
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
