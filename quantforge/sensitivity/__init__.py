"""Sensitivity analysis: one part of a model at a time is quantized, the rest stays float, and the loss is measured."""

from __future__ import annotations

from quantforge.sensitivity.analysis import analyze
from quantforge.sensitivity.results import Analysis, Cell, Section, from_json, to_json
from quantforge.sensitivity.show import to_html, to_markdown, write

__all__ = ["Analysis", "Cell", "Section", "analyze", "from_json", "to_html", "to_json", "to_markdown", "write"]
