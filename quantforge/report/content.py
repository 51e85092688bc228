"""All that a report says, made once from its record: what Markdown and HTML lay out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from quantforge.record import Report
from quantforge.report import layers, noise, tables, verdicts
from quantforge.report.groups import Name, lowest, measured, model_name, models, names, reference, setting, settings
from quantforge.report.noise import Difference
from quantforge.report.tables import Table
from quantforge.report.words import joined, number, perplexity, width_in_words


@dataclass(frozen=True)
class Content:
    """What the documents show; a table without rows is not shown.

    models     the name of each origin's model
    alerts     what makes the numbers untrustworthy, said first
    footnotes  (mark, text) of each note on size
    notes      (the run's name or nothing, what there is to say)
    noise      the sentences before the tables of comparisons
    caution    how many tests were made, and what that means; empty if none
    """

    report: Report
    title: str
    dates: str
    names: tuple[Name, ...]
    models: tuple[str, ...]
    alerts: tuple[str, ...]
    lead: str
    results: Table
    footnotes: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, str], ...]
    noise: tuple[str, ...]
    caution: str
    against_float: Table
    against_best: tuple[Table, ...]
    tasks: Table
    by_task: Table
    divergence: Table
    losses: Table
    inputs_of_losses: str
    widest: Table
    experts: Table
    has_best: bool
    has_intervals: bool
    has_answers: bool


def make(report: Report) -> Content:
    """Make everything that the documents say of a report."""
    found = noise.differences(report)
    called = names(report)
    results, tasks = tables.results(report), verdicts.tasks(report, found)
    notes = dict.fromkeys(("", note) for origin in report.origins for note in origin.model_notes)
    said = [verdicts.summary(report, found), *verdicts.floor_sentences(report, found)]
    compared = any(each.verdict for each in found)
    return Content(
        report=report,
        title=title(report),
        dates=joined(list(dict.fromkeys(origin.created for origin in report.origins)), 3),
        names=tuple(called),
        models=tuple(model_name(report, place) for place in range(len(report.origins))),
        alerts=tuple(alerts(report)),
        lead=lead(report, found),
        results=results,
        footnotes=tuple(tables.footnotes(report)[1]),
        notes=(*notes, *((called[i].text, note) for i, run in enumerate(report.runs) for note in run.notes)),
        noise=tuple(filter(None, [*said, noise.unpaired(report)])) if compared else (),
        caution=_caution(found),
        against_float=verdicts.against_float(report, found),
        against_best=tuple(verdicts.against_best(report, found)),
        tasks=tasks,
        by_task=verdicts.by_task(report, found),
        divergence=tables.divergence(report),
        losses=layers.losses(report),
        inputs_of_losses=layers.INPUTS,
        widest=layers.widest(report),
        experts=layers.experts(report),
        has_best=any(cell.tone == "best" for row in results.rows for cell in row),
        has_intervals=any(cell.detail for table in (results, tasks) for row in table.rows for cell in row[1:]),
        has_answers=any(c.about == tables.ANSWERS and c.heading != tables.RIGHT for c in results.columns),
    )


def title(report: Report) -> str:
    """Return the models that the report is about."""
    return joined(models(report)) or "no model"


def alerts(report: Report) -> list[str]:
    """Say of each comparison whose evaluation text is in part its calibration text how large that part is."""
    said = []
    for place, origin in enumerate(report.origins):
        share = origin.evaluation.get("overlap")
        if isinstance(share, (int, float)) and not isinstance(share, bool) and share > 0:
            several = f" for {model_name(report, place)}" if len(models(report)) > 1 else ""
            said.append(
                f"{number(100 * share, '.2g' if share < 0.1 else '.0f')} % of the evaluation text{several} is also in "
                "the calibration text: methods that calibrate look better than they are."
            )
    return list(dict.fromkeys(said))


def lead(report: Report, found: Sequence[Difference] = ()) -> str:
    """Say the result in words: the runs with the lowest perplexity at each width, and the float model's."""
    wheres = settings(report)
    said = []
    for where in wheres:
        parts = [_width(report, found, bits, places) for bits, places in lowest(report, where).items()]
        of = f" of {where[0]}" if len(wheres) > 1 else ""
        text = f"Lowest perplexity of the quantized rows{of}: {', '.join(parts)}." if parts else ""
        level = next((run for run in report.runs if setting(report, run) == where), None)
        place = None if level is None else reference(report, level)
        if place is not None and isfinite(report.runs[place].perplexity):
            text += f" The float model has {perplexity(report.runs[place].perplexity)}."
        said.append(text if parts else f"Nothing{of} was quantized.{text}")
    return " ".join(said) if said else "Nothing was quantized."


def _width(report: Report, found: Sequence[Difference], bits: int, places: list[int]) -> str:
    if not places:
        return f"at {width_in_words(bits)} none was measured"
    run = report.runs[places[0]]
    alone = ", the only row" if len(measured(report, setting(report, run), bits)) == 1 else ""
    labels = [report.runs[i].label for i in verdicts.rivals(found, places[0])]
    rivals = f", no difference shown from {joined(labels, 3)}" if labels and len(places) == 1 else ""
    names = " and ".join(report.runs[i].label for i in places)
    return f"at {width_in_words(bits)} {names} ({perplexity(run.perplexity)}{alone}{rivals})"


def _caution(found: Sequence[Difference]) -> str:
    count = sum(bool(each.verdict) for each in found)
    if not count:
        return ""
    one_in = f"one in {round(1 / noise.LEVEL)}"
    said = (
        f"A difference counts if p < {noise.LEVEL}. These are {count:,} tests: where nothing differs, about {one_in} "
        "finds a difference all the same."
    )
    if any(each.verdict and each.role == "best" for each in found):
        said += (
            " The best of a width is chosen on the same windows that it is compared on, so that comparisons with it "
            f"lean towards “worse”: more than {one_in} of them where nothing differs."
        )
    return said
