"""The pages of a run: Markdown, one self-contained HTML page, and the tables that both are made of.

Every name in a run is untrusted text: each file escapes what it prints.
"""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantforge.errors import clean
from quantforge.evaluation import significance
from quantforge.report.tables import Cell, Column, Table, markdown
from quantforge.report.templates import environment
from quantforge.report.words import MISSING, escape_markdown, number, perplexity, signed, span
from quantforge.store import write_text
from quantforge.training import results
from quantforge.training.results import NAME, Scored, Training


def score_table(run: Training) -> Table:
    """Return a row for the student before and after, and for the teacher."""
    columns = (
        Column("model", "which", text=True),
        Column("perplexity", "exp of the mean over windows of their mean cross-entropy; lower is better"),
        Column("95 %", "interval over windows"),
        Column("KL", "mean KL divergence from the teacher, nats per token; a lower bound"),
        Column("against before", "change of perplexity by training, with its interval from a paired bootstrap"),
    )
    rows = [
        _score_row(name, score, run.before)
        for name, score in (("student before", run.before), ("student after", run.after), ("teacher", run.level))
        if score is not None and score.losses
    ]
    return Table("Scores", columns, tuple(rows))


def _score_row(name: str, score: Scored, before: Scored | None) -> tuple[Cell, ...]:
    found = significance.perplexity_interval(score.losses) if len(score.losses) > 1 else None
    change = MISSING
    if before is not None and score is not before and len(score.losses) > 1 and name != "teacher":
        moved = significance.paired_change(before.losses, score.losses)
        low, high = (signed(100 * math.expm1(x), 2, " %") for x in (moved.mean.low, moved.mean.high))
        change = f"{signed(100 * math.expm1(moved.mean.value), 2, ' %')} ({span(low, high, ' to ')})"
    return (
        Cell(name),
        Cell(perplexity(score.perplexity)),
        Cell(MISSING if found is None else span(perplexity(found.low), perplexity(found.high))),
        Cell(number(score.kl, ".4f")),
        Cell(change),
    )


def text_table(run: Training) -> Table:
    """Return what the student's own texts show; no rows if none were written."""
    columns = (
        Column("texts of", "who wrote them", text=True),
        Column("teacher's loss", "−log p of their tokens under the teacher, nats per token; lower is better"),
        Column("distinct-2", "share of different ones among all pairs of tokens"),
        Column("ExAccErr", "how much more the student errs on its own prefixes than on the teacher's"),
    )
    found = run.texts
    if found is None:
        return Table("Texts", columns, ())
    rows = (
        (Cell("the student"), Cell(number(found.student_nll, ".3f")), Cell(number(found.distinct, ".3f")),
         Cell(number(found.excess, ".1%"))),
        (Cell("the teacher"), Cell(number(found.teacher_nll, ".3f")), Cell(number(found.of_teacher, ".3f")),
         Cell(MISSING)),
    )  # fmt: skip
    return Table("Texts", columns, rows)


def lead(run: Training) -> str:
    """Return the result in a sentence or two."""
    if run.before is None or run.after is None or not run.steps:
        return "The run is not finished."
    said = f"perplexity {perplexity(run.before.perplexity)} before, {perplexity(run.after.perplexity)} after"
    cost = f"{len(run.steps)} steps on {run.tokens:,} tokens, {run.seconds / 60:.1f} minutes"
    if run.level is None:
        return f"{said}; {cost}."
    level = f"the teacher has {perplexity(run.level.perplexity)}"
    share = ""
    if math.isfinite(run.recovered):
        back = f"so {run.recovered:.0%} of what was lost is back" if run.recovered >= 0 else "so it became worse"
        share = f", {back}"
    return f"{said}; {level}{share}. {cost[0].upper()}{cost[1:]}."


def to_text(run: Training) -> str:
    """Return the tables as Markdown that is aligned as plain text too, and the result in words."""
    tables = [markdown(table) for table in (score_table(run), text_table(run)) if table.rows]
    return "\n".join([*tables, lead(run)])


def to_markdown(run: Training) -> str:
    """Return the run in Markdown."""
    made = environment(lambda value: escape_markdown(str(value)), autoescape=False)
    tables = {name: Markup(markdown(t) if t.rows else "") for name, t in _tables(run).items()}
    command = Markup(html.escape(clean(run.command), quote=False))
    return made.get_template(f"{NAME}.md.j2").render(**_common(run), **tables, command=command)


def to_html(run: Training) -> str:
    """Return the run as one HTML page that loads nothing: style and plot are inside, and no script."""
    from quantforge.plots import drawing  # matplotlib takes a second
    from quantforge.training import curves

    made = environment(lambda value: clean(str(value)), autoescape=True)
    drawings = [
        Markup(drawing.svg(curves.figure(run, width), f"{NAME}-{size}", "Plot of loss by tokens trained on"))
        for size, width in (("wide", drawing.WIDE), ("narrow", drawing.NARROW))
    ]
    page = made.get_template(f"{NAME}.html.j2")
    return page.render(**_common(run), **_tables(run), drawings=drawings, command=run.command)


def write(run: Training, folder: Path) -> None:
    """Write training.json, .md and .html into `folder`; all are made before the first is written."""
    files = {"json": results.to_json(run), "md": to_markdown(run), "html": to_html(run)}
    for suffix, text in files.items():
        write_text(folder / f"{NAME}.{suffix}", text)


def _tables(run: Training) -> dict[str, Table]:
    return {"scores": score_table(run), "texts": text_table(run)}


def _common(run: Training) -> dict[str, Any]:
    """Return what both pages say."""
    trained = ", ".join(f"{count:,} {part}" for part, count in run.trained.items())
    return {"run": run, "lead": lead(run), "trained": trained or MISSING, "title": title(run)}


def title(run: Training) -> str:
    """Return what was trained, in a few words."""
    student = f"{run.student} {run.method}".strip()
    return f"{student}, taught by {run.teacher}" if run.teacher else f"{student}, trained"
