"""The plots of the report as inline SVG.

In all of them colour and marker say the series, a method with its format but for the width; those against bits, bytes
and depth have a wide and a narrow drawing, for screens and phones.
"""

from quantforge.plots.drawing import MOST_KINDS, MOST_LINES, MOST_SERIES, NARROW, WIDE, Look, empty, looks, series, svg
from quantforge.plots.histograms import histogram_figure
from quantforge.plots.loss import loss_figure, loss_kinds, loss_runs
from quantforge.plots.pareto import Spot, drawn, front, look_of, pareto_figure
from quantforge.plots.perplexity import perplexity_figure, perplexity_series

__all__ = [
    "MOST_KINDS", "MOST_LINES", "MOST_SERIES", "NARROW", "WIDE", "Look", "Spot", "drawn", "empty", "front",
    "histogram_figure", "look_of", "looks", "loss_figure", "loss_kinds", "loss_runs", "pareto_figure",
    "perplexity_figure", "perplexity_series", "series", "svg",
]  # fmt: skip
