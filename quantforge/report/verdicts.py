"""The tables and sentences that say which differences are more than noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from quantforge.record import Report
from quantforge.report.groups import is_floor, names
from quantforge.report.noise import NOTHING, Difference, What, below_floor, floors
from quantforge.report.tables import EMPTY, METHOD, Cell, Column, Table, all_answers, figure, name_cell, right
from quantforge.report.words import MISSING, joined, number, p_value, signed, span, width_in_words

AGAINST = Column("against", "the run it is compared with", text=True)
FLIPS = ("answers", "right answers lost and gained", "McNemar's test over the items of all tasks")
WHATS: tuple[What, ...] = ("perplexity", "KL", "answers")
SHAPES = {"better": "▲ ", "worse": "▼ "}


def against_float(report: Report, found: Sequence[Difference]) -> Table:
    """Return the comparisons with the float models, a row for each run; without rows if none has a verdict."""
    return _table(report, found, "Against the float model", [d for d in found if d.role == "float"])


def against_best(report: Report, found: Sequence[Difference]) -> list[Table]:
    """Return the comparisons with the best run of each width, a table for each width that has verdicts."""
    called, made = names(report), []
    for best in dict.fromkeys(d.against for d in found if d.role == "best"):
        title = f"At {width_in_words(report.runs[best].bits)}, against {called[best].text}"
        made.append(_table(report, found, title, [d for d in found if d.role == "best" and d.against == best]))
    return [table for table in made if table.rows]


def _table(report: Report, found: Sequence[Difference], title: str, own: Sequence[Difference]) -> Table:
    """Return a row for each run of `own`; what has a verdict for no run is left out."""
    own = [each for each in own if each.task is None]
    kinds = [what for what in WHATS if any(d.what == what and d.verdict for d in own)]
    heads = {"perplexity": "change of perplexity, percent", "KL": "change of the mean KL, nats", FLIPS[0]: FLIPS[1]}
    columns = [METHOD]
    for what in kinds:
        test = FLIPS[2] if what == "answers" else "paired bootstrap over windows"
        columns += [Column(what, heads[what]), Column("verdict", f"on the {what}: {test}", text=True)]
    called, floats = names(report), list[int]()
    rows: list[tuple[Cell, ...]] = []
    for i in dict.fromkeys(each.run for each in own):
        each = {d.what: d for d in own if d.run == i}
        head = name_cell(called[i])
        if is_floor(report.runs[i]):
            floats.append(len(rows))
            head = replace(head, detail=", ".join(filter(None, (head.detail, "noise floor"))))
        rows.append((head, *(cell for what in kinds for cell in _pair(report, found, each.get(what)))))
    return Table(title, tuple(columns), tuple(rows) if kinds else (), frozenset(floats))


def _pair(report: Report, found: Sequence[Difference], each: Difference | None) -> tuple[Cell, Cell]:
    """Return what changed and the verdict on it."""
    if each is None:
        return EMPTY, EMPTY
    if not each.verdict:
        return EMPTY, Cell("not compared", "", each.reason)
    remark = "no more than another dtype changes" if below_floor(report, found, each) else ""
    said = Cell(each.verdict, each.verdict, ", ".join(filter(None, (p_value(each.p), remark))), tone=_tone(each))
    if each.what == "answers":
        return Cell(f"−{each.lost:,} +{each.gained:,}", each.gained - each.lost, f"of {each.size:,}"), said
    if each.what == "KL":
        ends = span(signed(each.low, 4), signed(each.high, 4), " to ")
        return Cell(signed(each.change, 4), each.change, ends), said
    ends = span(signed(100 * each.low, 2), signed(100 * each.high, 2), " to ")
    return Cell(signed(100 * each.change, 2, " %"), each.change, ends), said


def _tone(each: Difference) -> str:
    return each.verdict if each.verdict in ("better", "worse") else ""


def floor_sentences(report: Report, found: Sequence[Difference]) -> list[str]:
    """Say for each run that is the float model in another dtype what it changes, and what that means for others."""
    said, called = [], names(report)
    for i, own in floors(report, found).items():
        run, parts = report.runs[i], []
        for each in own:
            if each.what == "perplexity":
                parts.append(f"perplexity by {signed(100 * each.change, 3, ' %')}")
            if each.what == "answers":
                parts.append(f"{each.lost + each.gained:,} of {each.size:,} answers")
        if math.isfinite(run.kl):
            parts.append(f"KL to {number(run.kl, 'z.5f')}")
        if run.divergence is not None:
            parts.append(f"{number(100 * (1 - run.divergence.agreement), 'z.2f')} % of the most probable tokens")
        if parts:
            said.append(
                f"{called[i].text} is the float model in another dtype. It changes {joined(parts)}: a difference below "
                "this is no larger than what another dtype changes."
            )
    return said


def summary(report: Report, found: Sequence[Difference]) -> str:
    """Say for which runs no difference in perplexity from the float model is shown, or none beyond another dtype's.

    Empty if none was compared.
    """
    own = [d for d in found if d.role == "float" and d.what == "perplexity" and report.runs[d.run].bits is not None]
    told = [each for each in own if each.verdict]
    if not told:
        return ""
    called = names(report)
    alike = [called[each.run].text for each in told if each.verdict == NOTHING]
    rounding = [called[d.run].text for d in told if d.verdict != NOTHING and below_floor(report, found, d)]
    said = []
    if alike:
        said.append(f"No difference in perplexity from the float model is shown for {joined(alike)}.")
    if rounding:
        said.append(f"The difference of {joined(rounding)} is no larger than what another dtype changes.")
    if len(told) > len(alike) + len(rounding):
        rest = "The other quantized rows differ" if said else "Every quantized row that was compared differs"
        said.append(f"{rest} from the float model in perplexity by more than noise.")
    return " ".join(said)


def rivals(found: Sequence[Difference], best: int) -> list[int]:
    """Return the runs of the same width whose perplexity no difference from the best one's is shown."""
    own = [d for d in found if d.role == "best" and d.what == "perplexity" and d.against == best]
    return [d.run for d in own if d.verdict == NOTHING]


def tasks(report: Report, found: Sequence[Difference]) -> Table:
    """Return the share of right answers, percent: a row for each task, a column for each run that has answers.

    A mark says that a run is better or worse than its float model by more than noise.
    """
    places, called = [i for i, run in enumerate(report.runs) if run.tasks], names(report)
    verdicts = {(d.run, d.task): d for d in found if d.what == "answers" and d.role == "float"}
    keys = list(dict.fromkeys((t.task, t.items, t.shots) for i in places for t in report.runs[i].tasks))
    answered = {(i, (t.task, t.items, t.shots)): t for i in places for t in report.runs[i].tasks}
    head = (
        Column("task", "its name", text=True), Column("shots", "examples before each item"),
        Column("items", "how many there are"), Column("chance", "right answers by guessing, percent"),
    )  # fmt: skip
    rows, pooled = [], all_answers(report)
    if len(keys) > 1 and pooled:
        size = len(next(iter(pooled.values())))
        cells = (_scored(pooled[i], verdicts.get((i, None))) for i in places)
        rows.append((Cell("all items together", "", tone="best"), Cell(""), Cell(f"{size:,}", size), Cell(""), *cells))
    for key in keys:
        first = next(t for (_, k), t in answered.items() if k == key)
        cells = (
            _scored(answered[i, key].answers, verdicts.get((i, key[0]))) if (i, key) in answered else EMPTY
            for i in places
        )  # fmt: skip
        size = len(first.answers)
        chance = figure(100 * first.chance, ".1f")
        rows.append((Cell(key[0], key[0]), Cell(str(key[2]), key[2]), Cell(f"{size:,}", size), chance, *cells))
    columns = (*head, *(Column(called[i].text, "right answers, percent") for i in places))
    return Table("Tasks", columns, tuple(rows))


def _scored(answers: str, each: Difference | None) -> Cell:
    cell = right(answers)
    if each is None or cell.text == MISSING:
        return cell
    return replace(cell, text=SHAPES.get(each.verdict, "") + cell.text, tone=_tone(each))


def by_task(report: Report, found: Sequence[Difference]) -> Table:
    """Return every test of answers, task by task."""
    called = names(report)
    columns = (
        METHOD, AGAINST, Column("task", "its name", text=True), Column("lost", "right in the other, wrong here"),
        Column("gained", "wrong in the other, right here"), Column("p", "McNemar's exact test, two-sided"),
        Column("verdict", "on this task alone", text=True),
    )  # fmt: skip
    rows = tuple(
        (
            name_cell(called[d.run]), name_cell(called[d.against]), Cell(d.task, d.task), Cell(f"{d.lost:,}", d.lost),
            Cell(f"{d.gained:,}", d.gained), figure(d.p, ".3g"),
            Cell(d.verdict or "not compared", d.verdict, d.reason, tone=_tone(d)),
        )
        for d in found if d.task is not None
    )  # fmt: skip
    return Table("Tests by task", columns, rows)
