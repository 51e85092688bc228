"""The report as one HTML page that loads nothing."""

from __future__ import annotations

import json

from markupsafe import Markup

from quantforge.errors import clean
from quantforge.record import to_json
from quantforge.report import drawings, layers, tables
from quantforge.report.content import Content
from quantforge.report.templates import environment

MOST_BYTES = 3_000_000  # of a page
MOST_ROWS = 6000  # of layers in a page
MOST_RECORD = 1_000_000  # characters of the record inside a page


def render(content: Content) -> str:
    """Lay a report out as HTML; parts of a page that would be too long are left out, and the page says so.

    First the record goes, then all but the layers that lose most, then the tests task by task, then the histograms.
    """
    report = content.report
    record = _inline(to_json(report))
    plots = {
        "pareto": drawings.pareto(report, content.names),
        "perplexity": drawings.perplexity(report, content.names),
        "loss": drawings.loss(report, content.names),
    }
    panels = drawings.histograms(report)
    template = environment(lambda value: clean(str(value)), autoescape=True).get_template("report.html.j2")
    page = ""
    for less in range(5):
        shown = [] if less > 3 else panels
        page = template.render(
            content=content,
            report=report,
            results=tables.parted(content.results),
            plots=plots,
            no_pareto=drawings.NO_PARETO,
            layers=layers.shown(report, MOST_ROWS if less < 2 else 0),
            by_task=content.by_task if less < 3 else None,
            histograms=shown,
            undrawn=drawings.histograms_left_out(report, shown),
            record=Markup(record) if len(record) <= MOST_RECORD and less < 1 else None,
        )
        if len(page) <= MOST_BYTES and len(page.encode()) <= MOST_BYTES:
            break
    return page


def _inline(text: str) -> str:
    """Make JSON short, and safe inside a script element: none of the characters that could end it is left."""
    text = json.dumps(json.loads(text), separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
