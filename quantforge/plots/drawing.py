"""What all plots share: palette, style, how a series looks, legends, and the drawing as inline SVG.

Figures are drawn in the light palette; `svg` turns each of its colours into the CSS variable of the page, so that one
drawing serves light and dark. Text stays text, in the page's font; names must be free of control characters.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
def style() -> Iterator[None]:
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


def drawable(value: float) -> bool:
    """Tell whether a value has a place on a log scale."""
    return 1e-30 < value < 1e30  # the limits leave room for margins on a log scale


def mark(look: Look, joined: bool) -> Line2D:
    """Return the entry of a series in a legend, with a line through it if its marks are joined."""
    return Line2D([], [], color=look.color, marker=look.marker, markersize=6, markeredgecolor=PAPER,
                  markeredgewidth=0.7, linewidth=1.6, linestyle="-" if joined else "")  # fmt: skip


def add_axes(figure: Figure, box: tuple[float, float, float, float], shared: Axes | None = None) -> Axes:
    """Add axes at (left, bottom, width, height) in inches, with the scales of `shared`."""
    wide, high = figure.get_size_inches()
    left, bottom, width, height = box
    place = (left / wide, bottom / high, width / wide, height / high)
    return figure.add_axes(place, sharex=shared, sharey=shared)


def tick(value: float, _: int | None) -> str:
    """Format the number of a tick."""
    return f"{value:,.10g}" if 1e-3 <= abs(value) < 1e6 else f"{value:.0e}"


def legend_columns(names: list[str], width: float) -> int:
    """Return how many columns a legend of these names has in a figure of `width` inches."""
    most = max(1, int(width / (0.66 + 0.078 * max(map(len, names)))))
    rows = math.ceil(len(names) / most)
    return math.ceil(len(names) / rows)


def add_legend(figure: Figure, handles: list[tuple[str, Line2D]], columns: int) -> None:
    """Put a legend of these names over a figure."""
    legend = figure.legend([line for _, line in handles], ["-"] * len(handles), loc="upper left", ncols=columns,
                           bbox_to_anchor=(0.0, 1.0), frameon=False, handlelength=2.6, columnspacing=1.6,
                           borderpad=0.1, labelspacing=0.45, borderaxespad=0.1)  # fmt: skip
    for text, (name, _) in zip(legend.get_texts(), handles, strict=True):  # set afterwards: "_x" would hide the entry
        text.set_parse_math(False)
        text.set_text(name)


def empty(width: float, message: str) -> Figure:
    """Return a figure that only says why there is nothing to draw."""
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
    with style():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', file.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib = {k: _for_page(k, v, name) for k, v in attributes.items() if k != "id" or v in used}
        for definitions in element.findall("{*}defs"):
            for sheet in definitions.findall("{*}style"):  # its rule for "*" would be one for the whole page
                definitions.remove(sheet)
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
    if key == "d":  # a hundredth of a point is not seen, and long paths make long pages
        return re.sub(r"-?\d+\.\d+", lambda hit: f"{float(hit[0]):.2f}".rstrip("0").rstrip("."), value)
    if key in ("href", "clip-path"):
        return re.sub(r"(^|\()#", rf"\1#{name}-", value)
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda hit: f"var({PALETTE[hit[0]]})" if hit[0] in PALETTE else hit[0], value)
        return re.sub(r"font-family: [^;]*(; )?", "", value)
    return value
