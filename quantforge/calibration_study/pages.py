"""The pages of a study: Markdown, one self-contained HTML page, and the tables that both are made of.

Every name in a study is untrusted text: each file escapes what it prints.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantforge.calibration_study import results, spread
from quantforge.calibration_study.results import Study
from quantforge.calibration_study.spread import CellResult, Effect, percent
from quantforge.errors import clean
from quantforge.evaluation.significance import Change
from quantforge.report.tables import Cell, Column, Table, markdown
from quantforge.report.templates import environment
from quantforge.report.words import MISSING, escape_markdown, number, perplexity, signed, span
from quantforge.store import write_text

NAME = "calibration-study"
BAD = "bad"  # tone of what is shown in red


def cell_table(study: Study) -> Table:
    """Return a row for each cell: perplexity and KL over its seeds, its change from the float model, its overlap."""
    columns = (
        Column("calibration", "windows x tokens of a text", text=True),
        Column("seeds", "how many draws"),
        Column("perplexity", "mean over seeds; lower is better"),
        Column("deviation", "standard deviation of perplexity over seeds"),
        Column("range", "smallest and largest perplexity"),
        Column("KL", "mean KL divergence from the float model, nats per token, over seeds"),
        Column("deviation", "standard deviation of KL over seeds"),
        Column("range", "smallest and largest KL"),
        Column("from float", "change of perplexity from the float model's"),
        Column("verdict", "of that change, by a paired bootstrap over windows", text=True),
        Column("overlap", "share of the evaluation windows' runs of tokens that were calibrated on"),
    )
    return Table("Cells", columns, tuple(map(_cell_row, spread.cells(study))))


def effect_table(study: Study) -> Table:
    """Return two rows for each level of a factor but its first: what it changes of perplexity, and of KL."""
    columns = (
        Column("choice", "what is chosen", text=True),
        Column("from", "first level", text=True),
        Column("to", "other level", text=True),
        Column("of", "what changes", text=True),
        Column("change", "of the mean over all other choices, less those whose seeds share most of their windows"),
        Column("95 % over windows", "interval of that change"),
        Column("over seeds", "standard deviation of that change over seeds"),
        Column("p", "the larger of the p-values over windows and over seeds"),
        Column("verdict", "a difference counts if both show it", text=True),
    )
    rows = [row for effect in spread.effects(study) for row in _effect_rows(effect)]
    return Table("What each choice moves", columns, tuple(rows))


def _cell_row(result: CellResult) -> tuple[Cell, ...]:
    level, kl = result.perplexity, result.kl
    return (
        Cell(str(result.cell)),
        Cell(str(len(result.runs))),
        Cell(perplexity(level.mean)),
        Cell(number(level.deviation, ".3f")),
        Cell(_range(level.low, level.high, perplexity)),
        Cell(number(kl.mean, ".4f")),
        Cell(number(kl.deviation, ".4f")),
        Cell(_range(kl.low, kl.high, lambda value: number(value, ".4f"))),
        Cell(MISSING if result.change is None else _percent(result.change.mean.value)),
        Cell(result.verdict),
        Cell(number(result.overlap.share, ".1%") + (", same text" if result.overlap.same else ""),
              tone=BAD if result.overlap.found else ""),
    )  # fmt: skip


def _effect_rows(effect: Effect) -> list[tuple[Cell, ...]]:
    """Return the row of perplexity, whose changes are in percent, and that of KL."""
    named = (Cell(spread.FACTORS[effect.factor][0]), Cell(str(effect.before)), Cell(str(effect.after)))
    loss, kl = effect.loss, effect.kl
    deviation = number(percent(loss.deviation), ".2f")
    return [
        (*named, Cell("perplexity"), *_change(loss.change, _percent),
         Cell(deviation if deviation == MISSING else f"{deviation} %"), _p(loss.change), Cell(loss.verdict)),
        (*named, Cell("KL"), *_change(kl.change, lambda value: signed(value, 4)),
         Cell(number(kl.deviation, ".4f")), _p(kl.change), Cell(kl.verdict)),
    ]  # fmt: skip


def _change(change: Change | None, said: Callable[[float], str]) -> tuple[Cell, Cell]:
    """Return the cells of a change and of its interval."""
    if change is None:
        return Cell(MISSING), Cell(MISSING)
    return Cell(said(change.mean.value)), Cell(span(said(change.mean.low), said(change.mean.high), " to ") or MISSING)


def _p(change: Change | None) -> Cell:
    return Cell(MISSING if change is None else number(change.p, ".3f"))


def _percent(change: float) -> str:
    return signed(percent(change), 2, " %")


def _range(low: float, high: float, said: Callable[[float], str]) -> str:
    return span(said(low), said(high)) or MISSING


def to_text(study: Study) -> str:
    """Return both tables as Markdown that is aligned as plain text too, the result in words, and what limits it."""
    tables = map(_markdown, (cell_table(study), effect_table(study)))
    return "\n".join(filter(None, [*tables, spread.lead(study), *map(clean, spread.notes(study))]))


def _markdown(table: Table) -> str:
    return markdown(table) if table.rows else ""


def to_markdown(study: Study) -> str:
    """Return the study in Markdown: the result in words, overlap, both tables, and how to repeat it."""
    made = environment(lambda value: escape_markdown(str(value)), autoescape=False)
    return made.get_template(f"{NAME}.md.j2").render(
        **_common(study),
        cells=Markup(_markdown(cell_table(study))),
        effects=Markup(_markdown(effect_table(study))),
        command=Markup(html.escape(clean(study.command), quote=False)),
    )


def to_html(study: Study) -> str:
    """Return the study as one HTML page that loads nothing: style and plot are inside, and no script."""
    from quantforge.calibration_study import plot  # matplotlib takes a second
    from quantforge.plots import drawing

    made = environment(lambda value: clean(str(value)), autoescape=True)
    drawings = [
        Markup(drawing.svg(plot.figure(study, width), f"{NAME}-{size}", "Plot of perplexity by cell, each seed a dot"))
        for size, width in (("wide", drawing.WIDE), ("narrow", drawing.NARROW))
    ]
    return made.get_template(f"{NAME}.html.j2").render(
        **_common(study),
        cells=cell_table(study),
        effects=effect_table(study),
        drawings=drawings,
        level_drawn=plot.level(study) is not None,
        command=study.command,
    )


def write(study: Study, folder: Path) -> None:
    """Write calibration-study.json, .md and .html into `folder`; all are made before the first is written."""
    files = {"json": results.to_json(study), "md": to_markdown(study), "html": to_html(study)}
    for suffix, text in files.items():
        write_text(folder / f"{NAME}.{suffix}", text)


def _common(study: Study) -> dict[str, Any]:
    """Return what both pages say."""
    losses = study.float_losses
    return {
        "study": study,
        "lead": spread.lead(study),
        "overlaps": spread.overlaps(study),
        "notes": spread.notes(study),
        "level": perplexity(math.exp(min(math.fsum(losses) / len(losses), 700))) if losses else MISSING,
        "seeds": ", ".join(map(str, study.design.seeds)),
    }
