"""The report in Markdown."""

from __future__ import annotations

import html

from markupsafe import Markup

from quantforge.errors import clean
from quantforge.report.content import Content
from quantforge.report.tables import MOST_IN_TEXT, Table, markdown, parted
from quantforge.report.templates import environment
from quantforge.report.words import escape_markdown


def render(content: Content) -> str:
    """Lay a report out in Markdown."""
    made = environment(lambda value: escape_markdown(str(value)), autoescape=False)
    made.globals.update(grid=_grid, code=lambda text: Markup(html.escape(clean(text), quote=False)))
    return made.get_template("report.md.j2").render(
        content=content, report=content.report, results=parted(content.results, MOST_IN_TEXT)
    )


def _grid(table: Table) -> Markup:
    return Markup(markdown(table))
