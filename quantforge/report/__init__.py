"""The report of one comparison or several: one record, written as JSON, as Markdown and as one HTML page.

The record is made of frozen dataclasses and is all that the three files are made from, so that the same record gives
the same bytes. Every name in it is untrusted text: each file escapes what it prints.
"""

from __future__ import annotations

from pathlib import Path

from quantforge.record import Report, to_json
from quantforge.report import content, markdown, page, tables
from quantforge.report.drawings import picture
from quantforge.report.merge import merge
from quantforge.report.words import escape_markdown, number, perplexity
from quantforge.store import write_text

__all__ = ["escape_markdown", "merge", "number", "perplexity", "picture", "table", "to_html", "to_markdown", "write"]


def table(report: Report) -> str:
    """Return the table of results alone, in Markdown, one row per run; with several columns of answers, as three."""
    parts = tables.parted(tables.results(report), tables.MOST_IN_TEXT)
    return "\n".join(tables.markdown(part, marks=False) for part in parts)


def to_markdown(report: Report) -> str:
    """Return the report in Markdown: its tables, what is more than noise, and how to repeat it."""
    return markdown.render(content.make(report))


def to_html(report: Report) -> str:
    """Return the report as one HTML page that loads nothing: styles, script, plots and the record are inside.

    What makes a page too long is left out, and said: first the record, then layers, then histograms.
    """
    return page.render(content.make(report))


def write(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into `folder`; all are made before the first is written."""
    made = content.make(report)
    files = {"report.json": to_json(report), "report.md": markdown.render(made), "report.html": page.render(made)}
    for name, text in files.items():
        write_text(folder / name, text)
