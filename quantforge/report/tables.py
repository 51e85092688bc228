"""The tables of a report, as cells of text with what they sort by; Markdown and HTML show the same ones."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from quantforge.record import Report, Run
from quantforge.report.groups import Name, best, failed, names
from quantforge.report.words import MISSING, escape_markdown, memory, number, perplexity, span

SIZE = "size (MB)"
COMPUTED = "computed from the parameter counts, not the size of a file"


@dataclass(frozen=True)
class Cell:
    """A cell: its text, what the column sorts by (None goes last), and what is shown smaller with it.

    mark  the letter of its footnote
    tone  "best", "better" or "worse"
    """

    text: str
    value: str | float | None = None
    detail: str = ""
    mark: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Column:
    """A column: its heading, what it holds in words, and whether that is text, which is untrusted, or numbers."""

    heading: str
    about: str
    text: bool = False


@dataclass(frozen=True)
class Table:
    """A table; `soft` are the places of the rows of float models."""

    name: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    soft: frozenset[int] = frozenset()


METHOD = Column("method", "method and format", text=True)
EMPTY = Cell(MISSING)


def figure(value: float | None, spec: str, unit: float = 1.0, detail: str = "") -> Cell:
    """Return the cell of a number, which sorts by all its digits; n/a if there is none."""
    text = number(value, spec, unit)
    return EMPTY if text == MISSING else Cell(text, value, detail)


def name_cell(name: Name) -> Cell:
    """Return the cell of a run's name."""
    return Cell(name.label, name.text, name.where)


def measured_only(table: Table, keep: int = 1) -> Table:
    """Leave out the columns, but the first `keep`, in which no row has a value."""
    kept = [i for i in range(len(table.columns)) if i < keep or any(row[i].text != MISSING for row in table.rows)]
    columns = tuple(table.columns[i] for i in kept)
    return replace(table, columns=columns, rows=tuple(tuple(row[i] for i in kept) for row in table.rows))


Measure = tuple[Column, Callable[[Run], Cell]]


def _bits(run: Run) -> Cell:
    return EMPTY if failed(run) else Cell("float" if run.bits is None else str(run.bits), run.bits)


def _perplexity(run: Run) -> Cell:
    low, high = interval(run.losses)
    return replace(figure(run.perplexity, ""), text=perplexity(run.perplexity), detail=_span(low, high))


def _span(low: float, high: float) -> str:
    ends = [math.exp(min(end, 700.0)) for end in (low, high)]
    return span(*(number(end, ".2e" if end > 1e4 else ".2f") for end in ends))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of a value per window; NaN where it is not known."""
    from quantforge.evaluation import significance  # scipy takes a second; reading a report must not
    from quantforge.report.noise import usable

    if not usable(values):
        return math.nan, math.nan
    found = significance.mean_interval(values)
    return found.low, found.high


def right(answers: str) -> Cell:
    """Return the cell of a share of right answers, in percent, with Wilson's interval; n/a without answers."""
    from quantforge.evaluation import significance

    if not answers:
        return EMPTY
    share = significance.accuracy([c == "1" for c in answers], 0.5).share
    ends = span(number(100 * share.low, ".1f"), number(100 * share.high, ".1f"))
    return figure(100 * share.value, ".1f", detail=ends)


def _seconds(run: Run) -> Cell:
    return EMPTY if run.bits is None else figure(run.seconds, ".1f")


def _memory(run: Run) -> Cell:
    text = memory(run)
    return EMPTY if text == MISSING else Cell(text, run.peak_memory_bytes)


def bits_per_byte(report: Report, run: Run) -> float:
    """Return the bits that a run needs for each byte of the evaluation text, NaN if that is not known.

    The sum of its losses over the bytes of the text that is predicted, which does not depend on the tokenizer.
    """
    from quantforge.report.noise import usable

    evaluation = report.origins[run.origin].evaluation
    size, length = evaluation.get("text_bytes"), evaluation.get("seq_len")
    if type(size) is not int or type(length) is not int or not 0 < size < 2**53 or not 1 < length < 2**53:
        return math.nan
    return math.fsum(run.losses) * (length - 1) / math.log(2) / size if usable(run.losses) else math.nan


def all_answers(report: Report, tasks: Collection[str] | None = None) -> dict[int, str]:
    """Return every run's answers to all tasks, or to `tasks`, by its place.

    Nothing unless those runs that have tasks have the same.
    """
    asked = {i: [(t.task, t.items, t.shots) for t in run.tasks] for i, run in enumerate(report.runs) if run.tasks}
    if any(found != next(iter(asked.values())) for found in asked.values()):
        return {}
    return {i: "".join(t.answers for t in report.runs[i].tasks if tasks is None or t.task in tasks) for i in asked}


def task_columns(report: Report) -> dict[str, tuple[str, ...]]:
    """Return the columns of answers that the results have: the heading of each and its tasks; none without answers.

    Tasks that share what leads to their first "_" are one column where there are more than MOST_ALONE, called
    "blimp (34)". All others have a column each, or are one if the columns would be more than MOST_ALONE.
    """
    asked = list(dict.fromkeys(task.task for run in report.runs for task in run.tasks)) if all_answers(report) else []
    families: dict[str, list[str]] = {}
    for task in asked:
        families.setdefault(task.partition("_")[0], []).append(task)
    large = {name: tasks for name, tasks in families.items() if len(tasks) > MOST_ALONE}
    alone = [task for tasks in families.values() if len(tasks) <= MOST_ALONE for task in tasks]
    found = {f"{name} ({len(tasks)})": tuple(tasks) for name, tasks in large.items()}
    if not alone or len(found) + len(alone) <= MOST_ALONE:
        return {task: (task,) for task in alone} | found
    return {f"others ({len(alone)})" if found else RIGHT: tuple(alone)} | found


QUALITY: tuple[Measure, ...] = (
    (Column("bits", "bits of a code"), _bits),
    (Column("bits/weight", "bits per weight, all that is stored counted"), lambda r: figure(r.bits_per_weight, ".3f")),
    (Column("perplexity", "on the evaluation text; lower is better"), _perplexity),
    (Column("KL", "mean KL divergence from the float model, nats per token"), lambda r: figure(r.kl, "z.4f")),
    (Column("same top-1 (%)", "predictions whose most probable token is the float model's, percent"),
     lambda r: figure(None if r.divergence is None else 100 * r.divergence.agreement, ".1f")),
)  # fmt: skip
COST: tuple[Measure, ...] = (
    (Column(SIZE, "of the saved model, 10⁶ bytes"), lambda r: figure(r.bytes_on_disk, ".1f", 1e6)),
    (Column("seconds", "to quantize"), _seconds),
    (Column("peak memory (MB)", "above the loaded model, 10⁶ bytes"), _memory),
    (
        Column(
            "evaluated (tokens/s)", "of the evaluation, whole windows at once, with dequantized weights: not of serving"
        ),
        lambda r: figure(r.tokens_per_second, ",.0f"),
    ),
)
BYTE = Column("bits/byte", "bits for each byte of the evaluation text, whatever the tokenizer; lower is better")
ANSWERS = "right answers to all items, percent"
RIGHT = "right (%)"
MOST_ALONE = 4  # tasks with columns of their own among the results
MOST_IN_TEXT = 12  # columns of the results in Markdown: all there are with one of answers


def results(report: Report) -> Table:
    """Return the table of results: everything that was measured, a row for each run."""
    measures = [measure for _, measure in (*QUALITY, *COST)]
    columns = [METHOD, *(column for column, _ in (*QUALITY, *COST))]
    marked, (marks, _) = best(report), footnotes(report)
    answers = {heading: all_answers(report, tasks) for heading, tasks in task_columns(report).items()}
    place = columns.index(QUALITY[-1][0]) + 1
    rows = []
    for i, (run, name) in enumerate(zip(report.runs, names(report), strict=True)):
        cells = [name_cell(name), *(measure(run) for measure in measures)]
        for k, column in enumerate(columns):
            if column.heading == "perplexity" and i in marked:
                cells[k] = replace(cells[k], tone="best")
            if column.heading == SIZE and i in marks:
                cells[k] = replace(cells[k], mark=marks[i])
        shares = (right(own.get(i, "")) for own in answers.values())
        rows.append((*cells[:place], figure(bits_per_byte(report, run), ".4f"), *shares, *cells[place:]))
    columns[place:place] = [BYTE, *(Column(heading, ANSWERS) for heading in answers)]
    return measured_only(Table("Results", tuple(columns), tuple(rows), soft(report)), keep=3 if rows else 1)


def soft(report: Report) -> frozenset[int]:
    """Return the places of the float models' rows, whatever their dtype."""
    return frozenset(i for i, run in enumerate(report.runs) if run.bits is None and not failed(run))


def parted(table: Table, most: int = 8) -> list[Table]:
    """Part the results into quality and cost if they have more than `most` columns: both then fit a page's width.

    Several columns of answers are a part of their own.
    """
    if len(table.columns) <= most:
        return [table]
    size, *rest = (column for column, _ in COST)
    bits, cost = QUALITY[0][0], {column for column in table.columns if column in rest}
    answers = {column for column in table.columns if column.about == ANSWERS}
    answers = answers if len(answers) > 1 else set()
    if not answers | cost:
        return [table]
    parts = [_part(table, "Results", set(table.columns) - {bits} - cost - answers)]
    parts += [_part(table, "Right answers, percent", {METHOD, bits} | answers)] if answers else []
    return [*parts, *([_part(table, "Cost", {METHOD, bits, size} | cost)] if cost else [])]


def _part(table: Table, name: str, columns: set[Column]) -> Table:
    """Return some of the columns as a table of their own; only the first of the parts has the marks of footnotes."""
    places = [i for i, column in enumerate(table.columns) if column in columns]
    rows = tuple(tuple(_unmarked(row[i], name == table.name) for i in places) for row in table.rows)
    return replace(table, name=name, columns=tuple(table.columns[i] for i in places), rows=rows)


def _unmarked(cell: Cell, keep: bool) -> Cell:
    return cell if keep else replace(cell, mark="")


def divergence(report: Report) -> Table:
    """Return how far the predictions lie from the float model's, a row for each run that was compared with it."""
    columns = (
        METHOD,
        Column("KL", "mean over the predictions, nats"),
        Column("median", "of the predictions' KL, nats"),
        Column("99th percentile", "of the predictions' KL, nats"),
        Column("same top-1 (%)", "predictions whose most probable token is the float model's, percent"),
        Column("lost", "next tokens that the float model finds most probable and this one does not"),
        Column("gained", "next tokens that this one finds most probable and the float model does not"),
        Column("missed (%)", "part of the KL that the lower bound misses, measured on the first windows, percent"),
    )
    rows: list[tuple[Cell, ...]] = []
    floats: list[int] = []
    for run, name in zip(report.runs, names(report), strict=True):
        found = run.divergence
        if found is None:
            continue
        low, high = interval(run.kls)
        if run.bits is None:
            floats.append(len(rows))
        rows.append((
            name_cell(name),
            figure(run.kl, _digits(run.kl), detail=span(number(low, "z.4f"), number(high, "z.4f"))),
            figure(found.median, _digits(found.median)),
            figure(found.p99, ".3f"),
            figure(100 * found.agreement, ".2f"),
            Cell(f"{found.lost:,}", found.lost),
            Cell(f"{found.gained:,}", found.gained),
            figure(_unseen(found.dense, found.bound), "z.1f"),
        ))  # fmt: skip
    return measured_only(Table("Divergence", columns, tuple(rows), frozenset(floats)))


def _digits(value: float) -> str:
    return ".1e" if 5e-7 < abs(value) < 5e-4 else "z.4f"


def _unseen(dense: float, bound: float) -> float:
    return 100 * (1 - bound / dense) if math.isfinite(dense) and abs(dense) > 1e-9 else math.nan


def size_note(run: Run) -> str:
    """Return what there is to say about a run's size; the float model has none on disk."""
    computed = [COMPUTED] if run.bits is None and run.bytes_on_disk is not None else []
    return "; ".join([*computed, *([run.disk_note] if run.disk_note else [])])


def footnotes(report: Report) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Return the footnotes on size: the mark of each run that has one, by its place, and (mark, text) of each text."""
    texts = list(dict.fromkeys(note for run in report.runs if (note := size_note(run))))
    marks = {text: _letters(i) for i, text in enumerate(texts)}
    places = {i: marks[note] for i, run in enumerate(report.runs) if (note := size_note(run))}
    return places, [(mark, text) for text, mark in marks.items()]


def _letters(place: int) -> str:
    """Return a, b, …, z, aa, ab, … for 0, 1, …: next to numbers, letters cannot be taken for digits."""
    return (_letters(place // 26 - 1) if place >= 26 else "") + "abcdefghijklmnopqrstuvwxyz"[place % 26]


def markdown(table: Table, marks: bool = True) -> str:
    """Lay a table out in Markdown, aligned as plain text too: text left, numbers right, details in brackets."""
    rows = [[_markdown_cell(cell, c.text, marks) for cell, c in zip(r, table.columns, strict=True)] for r in table.rows]
    headings = [escape_markdown(column.heading) for column in table.columns]
    widths = [max(3, *map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    left = [column.text for column in table.columns]
    rule = ["-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, left, strict=True)]
    lines = [_line(headings, widths, left), _line(rule, widths, left)]
    return "\n".join([*lines, *(_line(row, widths, left) for row in rows)]) + "\n"


def _markdown_cell(cell: Cell, text: bool, marks: bool) -> Markup:
    mark = f" ({cell.mark})" if cell.mark and marks else ""
    whole = f"{cell.text}{f' ({cell.detail})' if cell.detail else ''}{mark}"
    return escape_markdown(whole) if text else Markup(html.escape(whole, quote=False))


def _line(cells: Iterable[str], widths: list[int], left: list[bool]) -> str:
    padded = [f"{c!s:<{w}}" if text else f"{c!s:>{w}}" for c, w, text in zip(cells, widths, left, strict=True)]
    return f"| {' | '.join(padded)} |"
