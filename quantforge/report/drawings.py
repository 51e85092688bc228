"""The drawings of a page, made from a report's runs, and what their captions must say of what was left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from quantforge.errors import clean
from quantforge.record import Histogram, Report, Run
from quantforge.report.groups import Name, is_float, is_floor, model_name, models, settings
from quantforge.report.groups import names as called
from quantforge.report.noise import usable
from quantforge.report.tables import bits_per_byte
from quantforge.report.words import joined, width_in_words

if TYPE_CHECKING:
    from quantforge.plots import Spot

MOST_PANELS, MOST_PANELS_OF_RUN = 48, 8
BYTE = "bits per byte of text"
NO_PARETO = "No quality that can be compared between these models was measured: not all have bits per byte of text."


@dataclass(frozen=True)
class Plot:
    """A plot as SVG, wide and narrow, and what its caption must add."""

    wide: Markup
    narrow: Markup
    caption: str = ""


@dataclass(frozen=True)
class Panel:
    """A histogram: the layer, "weights" or "inputs", and the drawing."""

    layer: str
    what: str
    drawing: Markup


def cleaned(report: Report, names: Sequence[Name]) -> list[Run]:
    """Return the runs by their full names, free of what plots cannot hold: they pass through XML."""
    found = []
    for run, name in zip(report.runs, names, strict=True):
        layers = tuple(replace(layer, kind=clean(layer.kind)) for layer in run.layers)
        method = f"{run.method} · {name.where}" if name.where else run.method
        found.append(replace(run, label=clean(name.text), method=clean(method), layers=layers))
    return found


def quality(report: Report) -> tuple[str, list[float]]:
    """Return what the runs can be ranked by, in words, and its value for each.

    Perplexity where all share their evaluation tokens; else bits per byte, which needs no common tokenizer, if all that
    have losses have it; else, for one model, KL. The words are empty for several models without bits per byte: each is
    at 0 from itself, so that KL does not rank them.
    """
    if len({digest for _, digest in settings(report)}) <= 1:
        return "perplexity", [run.perplexity for run in report.runs]
    values = [bits_per_byte(report, run) for run in report.runs]
    known = [math.isfinite(value) for run, value in zip(report.runs, values, strict=True) if usable(run.losses)]
    if known and all(known):
        return BYTE, values
    if len(models(report)) > 1:
        return "", [math.nan] * len(values)
    return "KL divergence from the own float model, nats", [run.kl for run in report.runs]


def pareto(report: Report, names: Sequence[Name]) -> Plot | None:
    """Return the plot of quality against bytes on disk; None for several models that no quality ranks."""
    from quantforge import plots  # matplotlib takes a second; reading a record must not

    what, values = quality(report)
    if not what:
        return None
    spots, runs = _spots(report, names, values), cleaned(report, names)
    several = len(models(report)) > 1
    colors = markers = None
    if not several:
        colors, markers = plots.look_of(spots, {look.name: look for look in plots.looks(runs).values()})
    wide, narrow = (
        Markup(
            plots.svg(
                plots.pareto_figure(spots, what, width, colors, markers),
                f"pareto-{size}",
                f"Plot of {what} against size",
            )
        )
        for size, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))
    )
    said = ["Colour says the model, shape the method."] if several else []
    ranked = zip(report.runs, names, values, strict=True)
    unknown = [name.text for run, name, value in ranked if math.isfinite(run.perplexity) and not math.isfinite(value)]
    if unknown and what == BYTE:
        said.append(f"Not drawn, for want of {BYTE}: {joined(unknown)}.")
    return Plot(wide, narrow, " ".join(said))


def picture(report: Report) -> str:
    """Return the plot of quality against bytes on disk as an SVG file that stands alone, light and dark.

    Where there is none, the drawing says why.
    """
    from quantforge import plots

    css = (Path(__file__).parent.parent / "templates" / "report.css.j2").read_text(encoding="utf-8")
    variables = css[: css.index("* {")]  # of both themes
    text = "svg { background: var(--paper) } text { font-family: var(--sans) }"
    plot = pareto(report, called(report))
    drawing = str(plot.wide) if plot else plots.svg(plots.empty(plots.WIDE, NO_PARETO), "pareto-none", NO_PARETO)
    head, _, rest = drawing.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{variables}{text}</style>{rest}\n'


def _spots(report: Report, names: Sequence[Name], values: Sequence[float]) -> list[Spot]:
    from quantforge import plots

    runs = cleaned(report, names)
    look, several = plots.looks(runs), len(models(report)) > 1
    found = []
    for run, clear, name, value in zip(report.runs, runs, names, values, strict=True):
        level = is_float(run)
        if run.bytes_on_disk is None or not (level or run.bits is not None):
            continue
        own = "" if level else look[plots.series(clear)].name
        color, shape = (clean(model_name(report, run.origin)), clean(run.method)) if several else (own, own)
        size = float(min(run.bytes_on_disk, 10**30))
        found.append(plots.Spot(clean(run.label if several else name.text), color, shape, size, value, level))
    # one float model measured on several machines is one mark
    return list({(s.color, s.size, s.quality) if s.level else k: s for k, s in enumerate(found)}.values())


def perplexity(report: Report, names: Sequence[Name]) -> Plot | None:
    """Return the plot of perplexity against bits per weight; None for several models, whose bits weigh differently."""
    from quantforge import plots

    if len(models(report)) > 1:
        return None
    both = zip(report.runs, cleaned(report, names), strict=True)
    runs = [clear for run, clear in both if not is_floor(run)]  # which would lie on the float model
    said = []
    if any(len(members) > 1 for members in plots.perplexity_series(runs).values()):
        said.append("A line joins the widths of one method.")
    if len(plots.looks(runs)) > plots.MOST_SERIES:
        said.append(f"The first {plots.MOST_SERIES} methods are drawn.")
    wide, narrow = (
        Markup(
            plots.svg(
                plots.perplexity_figure(runs, width), f"perplexity-{size}", "Plot of perplexity against bits per weight"
            )
        )
        for size, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))
    )
    return Plot(wide, narrow, " ".join(said))


def loss(report: Report, names: Sequence[Name]) -> Plot:
    """Return the plot of relative loss over depth."""
    from quantforge import plots

    runs = cleaned(report, names)
    wide, narrow = (
        Markup(plots.svg(plots.loss_figure(runs, width), f"loss-{size}", "Plot of relative loss by layer"))
        for size, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))
    )
    return Plot(wide, narrow, _left_out(runs))


def _left_out(runs: list[Run]) -> str:
    """Say which runs and kinds of layer the plot of losses draws, if not all; empty if it does."""
    from quantforge import plots

    shown = plots.loss_runs(runs)
    every, kinds = [run for run in runs if run.layers and run.bits is not None], len(plots.loss_kinds(shown))
    said = []
    if len(shown) < len(every):
        bits = {run.bits for run in shown}
        width = f" at {width_in_words(next(iter(bits)))}" if len(bits) == 1 else ""
        lowest = " with the lowest perplexity" if len(shown) < sum(run.bits in bits for run in every) else ""
        said.append(f"Of {len(every)} runs, the {len(shown)}{width}{lowest} are drawn; the tables below have all.")
    if kinds > plots.MOST_KINDS:
        said.append(f"Of {kinds} kinds of layer, the first {plots.MOST_KINDS} are drawn.")
    return " ".join(said)


def histograms(report: Report) -> list[tuple[int, list[Panel]]]:
    """Return the place of each run that has histograms with their drawings, as many as a page can hold."""
    from quantforge import plots

    places = [i for i, run in enumerate(report.runs) if run.histograms]
    most = min(MOST_PANELS_OF_RUN, MOST_PANELS // len(places)) if places else 0
    found = []
    for i in places[:MOST_PANELS]:
        own = report.runs[i].histograms[: max(1, most)]
        panels = []
        for k, histogram in enumerate(own):
            figure = plots.histogram_figure(histogram)
            about = f"Histogram of {'inputs' if histogram.what == 'inputs' else 'weights'}"
            panels.append(Panel(histogram.layer, histogram.what, Markup(plots.svg(figure, f"values-{i}-{k}", about))))
        found.append((i, panels))
    return found


def histograms_left_out(report: Report, shown: Sequence[tuple[int, Sequence[Panel]]]) -> int:
    """Return how many histograms of the record a page does not draw."""
    every: list[Histogram] = [histogram for run in report.runs for histogram in run.histograms]
    return len(every) - sum(len(panels) for _, panels in shown)
