"""The comparison report: one record of runs, written as JSON, as Markdown and as one self-contained HTML page.

The record is made of frozen dataclasses and is all that the three files are made from, so that the same record gives
the same bytes. Every name in it is untrusted text: each file escapes what it prints.
"""

from __future__ import annotations

import html
import json
import math
import re
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantforge.errors import clean
from quantforge.record import LayerRow, Report, Run, to_json
from quantforge.store import write_text

MISSING = "n/a"
SIZE = "size (MB)"
COMPUTED = "computed from the parameter counts, not the size of a file"
MOST_ROWS, FEW_ROWS = 6000, 20  # of layers in a page: all of them, or so many of each run
MOST_RECORD = 1_000_000  # characters of the record inside a page


def escape_markdown(text: str) -> Markup:
    """Escape `text` for a line, a list item or a table cell of Markdown; the result is never escaped twice."""
    text = html.escape(clean(text), quote=False)
    text = re.sub(r"([\\`*\[\]|~$])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)  # inside a word "_" means nothing
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)  # would begin a numbered list
    return Markup(re.sub(r"^(?=[#+=-])", r"\\", text))


def number(value: float | None, spec: str, unit: float = 1.0) -> str:
    """Format `value / unit` by the format `spec`; "n/a" for None, NaN and infinities."""
    return MISSING if value is None or not math.isfinite(value) else format(value / unit, spec)


def perplexity(value: float) -> str:
    """Format a perplexity: three decimals, scientific above 10⁴."""
    return number(value, ".3e" if value > 1e4 else ".3f")


def width_in_words(bits: int | None) -> str:
    """Say a width: "1 bit", "4 bits", "float"."""
    return "float" if bits is None else f"{bits} bit" if bits == 1 else f"{bits} bits"


def memory(run: Run) -> str:
    """Format a run's peak memory in megabytes.

    "n/a" where nothing was quantized or measured: a peak of 0 only says that it stayed below an earlier one.
    """
    if run.bits is None or run.peak_memory_bytes is None or run.peak_memory_bytes <= 0:
        return MISSING
    return number(run.peak_memory_bytes, ".1f", 1e6) if run.peak_memory_bytes >= 50_000 else "< 0.1"


def plain(value: Any) -> str:
    """Show a JSON value in words: lists by commas, objects as key=value, floats to six digits."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={plain(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, ".6g")
    return "none" if value is None else str(value)


def facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Show a dictionary as pairs of words; a key that ends in "_bytes" becomes a size."""
    sizes = {k: v for k, v in values.items() if k.endswith("_bytes") and type(v) in (int, float)}
    return [
        (key.removesuffix("_bytes").replace("_", " "), f"{number(value, ',.1f', 1e6)} MB")
        if key in sizes
        else (key.replace("_", " "), plain(value))
        for key, value in values.items()
    ]


@dataclass(frozen=True)
class Column:
    """A column of the results: its heading, what it measures in words, and a run's value and text."""

    heading: str
    about: str
    value: Callable[[Run], str | float | None]
    text: Callable[[Run], str]


COLUMNS = (
    Column("method", "method and format", lambda r: r.label, lambda r: r.label),
    Column("bits", "bits of a code", lambda r: r.bits, lambda r: "float" if r.bits is None else str(r.bits)),
    Column("bits/weight", "bits per weight, all that is stored counted", lambda r: r.bits_per_weight,
           lambda r: number(r.bits_per_weight, ".3f")),
    Column("perplexity", "on the evaluation text; lower is better", lambda r: r.perplexity,
           lambda r: perplexity(r.perplexity)),
    Column("KL", "mean KL divergence from the float model, nats per token", lambda r: r.kl,
           lambda r: number(r.kl, "z.4f")),
    Column(SIZE, "of the saved model, 10⁶ bytes", lambda r: r.bytes_on_disk,
           lambda r: number(r.bytes_on_disk, ".1f", 1e6)),
    Column("seconds", "to quantize", lambda r: r.seconds,
           lambda r: MISSING if r.bits is None else number(r.seconds, ".1f")),
    Column("peak memory (MB)", "above the loaded model, 10⁶ bytes", lambda r: r.peak_memory_bytes, lambda r: memory(r)),
)  # fmt: skip


def table(report: Report) -> str:
    """Return the table of results alone, in Markdown, one row per run."""
    return _table(report, {})


def _table(report: Report, marks: dict[int, str]) -> str:
    """Return the table of results in Markdown, the size of run i followed by the mark of its footnote, `marks[i]`."""
    rows = [
        [
            escape_markdown(f"{c.text(run)} ({marks[i]})" if c.heading == SIZE and i in marks else c.text(run))
            for c in COLUMNS
        ]
        for i, run in enumerate(report.runs)
    ]
    return _grid([Markup(column.heading) for column in COLUMNS], rows)


def _grid(headings: list[Markup], rows: list[list[Markup]]) -> str:
    """Lay out a Markdown table that is aligned as plain text too: the first column left, numbers right."""
    widths = [max(3, *map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    lines = [_line(headings, widths), _line(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)]) + "\n"


def _line(cells: Iterable[str], widths: list[int]) -> str:
    padded = [f"{c!s:<{w}}" if i == 0 else f"{c!s:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return f"| {' | '.join(padded)} |"


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


def lowest(report: Report) -> dict[int, list[int]]:
    """Return, by width in order of appearance, the places of the runs with the lowest perplexity; several if equal."""
    found: dict[int, list[int]] = {}
    for bits in dict.fromkeys(run.bits for run in report.runs if run.bits is not None):
        measured = {i: report.runs[i].perplexity for i in _measured(report, bits)}
        found[bits] = [i for i, value in measured.items() if value == min(measured.values())]
    return found


def _measured(report: Report, bits: int) -> list[int]:
    return [i for i, run in enumerate(report.runs) if run.bits == bits and math.isfinite(run.perplexity)]


def best(report: Report) -> set[int]:
    """Return the places of the runs with the lowest perplexity of their width, where a width has several."""
    return {i for bits, places in lowest(report).items() if len(_measured(report, bits)) > 1 for i in places}


def lead(report: Report) -> str:
    """Say the result in words: the runs with the lowest perplexity at each width, and the float model's."""
    parts = []
    for bits, places in lowest(report).items():
        names = " and ".join(report.runs[i].label for i in places)
        alone = ", the only row" if len(_measured(report, bits)) == 1 else ""
        said = f"{names} ({perplexity(report.runs[places[0]].perplexity)}{alone})" if places else "none was measured"
        parts.append(f"at {width_in_words(bits)} {said}")
    said = f"Lowest perplexity of the quantized rows: {', '.join(parts)}." if parts else "Nothing was quantized."
    level = [run for run in report.runs if run.bits is None and math.isfinite(run.perplexity)]
    return f"{said} The float model has {perplexity(level[0].perplexity)}." if level else said


def _environment(finalize: Callable[[Any], Any], autoescape: bool) -> Environment:
    """Set up templates in which every expression passes through `finalize`; Markup is taken as finished."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else finalize(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["csp_hash"] = lambda text: f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
    environment.globals.update(facts=facts, number=number, plain=plain)
    return environment


def to_markdown(report: Report) -> str:
    """Return the report in Markdown: the table of results, the losses by kind of layer, and how to repeat it."""
    command = Markup(html.escape(clean(report.command), quote=False))
    environment = _environment(lambda value: escape_markdown(str(value)), autoescape=False)
    marks, notes = footnotes(report)
    return environment.get_template("report.md.j2").render(
        report=report,
        lead=lead(report),
        table=Markup(_table(report, marks)),
        footnotes=notes,
        losses=Markup(_losses(report)),
        experts=Markup(_experts(report)),
        widest=Markup(_widest(report)),
        command=command,
    )


def _losses(report: Report) -> str:
    """Return a Markdown table of the mean relative loss per run and kind of layer; empty if no run has layers."""
    runs = [run for run in report.runs if run.layers]
    kinds = list(dict.fromkeys(layer.kind for run in runs for layer in run.layers))
    rows = [
        [escape_markdown(run.label), *(Markup(number(_mean_loss(run, kind), ".2e")) for kind in kinds)] for run in runs
    ]
    return _grid([Markup("method"), *map(escape_markdown, kinds)], rows) if rows else ""


def _experts(report: Report) -> str:
    """Return `experts` as a Markdown table; empty if there are none."""
    rows = [[Markup(cell) for cell in row] for row in experts(report)]
    return _grid([Markup(heading) for heading in EXPERT_COLUMNS], rows) if rows else ""


def _widest(report: Report) -> str:
    """Return `widest` as a Markdown table; empty if there are none."""
    rows = [[escape_markdown(cell) for cell in row] for row in widest(report)]
    return _grid([Markup(heading) for heading in WIDEST_COLUMNS], rows) if rows else ""


def _mean_loss(run: Run, kind: str) -> float:
    losses = [layer.relative_loss for layer in run.layers if layer.kind == kind]
    return math.fsum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else math.nan


def experts(report: Report) -> list[list[str]]:
    """Return a row for each block of experts: how many, and the calibration tokens that they saw.

    Of the first run that says; empty for models without experts.
    """
    for run in report.runs:
        seen: dict[int, dict[str, int]] = {}
        for layer in run.layers:
            tokens = layer.notes.get("tokens")
            if isinstance(tokens, int) and layer.block is not None:
                seen.setdefault(layer.block, {})[layer.name.rpartition(".")[0]] = tokens
        if seen:
            return [_expert_row(block, sorted(found.values())) for block, found in sorted(seen.items())]
    return []


def widest(report: Report) -> list[list[str]]:
    """Return a row for each run that smoothed inputs and kind of layer: the widest channel's |x| before and after."""
    rows = []
    for run in report.runs:
        kinds: dict[str, list[tuple[float, float]]] = {}
        for layer in run.layers:
            ends = (layer.notes.get("widest_input"), layer.notes.get("smoothed_to"))
            if isinstance(ends[0], float) and isinstance(ends[1], float):
                kinds.setdefault(layer.kind, []).append((ends[0], ends[1]))
        for kind, found in kinds.items():
            before, after = (number(max(part), ".1f") for part in zip(*found, strict=True))
            rows.append([run.label, kind, before, after])
    return rows


WIDEST_COLUMNS = ("method", "layer", "widest input", "smoothed to")
EXPERT_COLUMNS = ("block", "experts", "fewest tokens", "median", "most", "without any")


def _expert_row(block: int, tokens: list[int]) -> list[str]:
    cells = (block, len(tokens), tokens[0], tokens[len(tokens) // 2], tokens[-1], tokens.count(0))
    return [f"{cell:,}" for cell in cells]


def to_html(report: Report) -> str:
    """Return the report as one HTML page that loads nothing: styles, script, plots and the record are inside.

    A record too long for a page is left out, and of very many layers each run shows those that lose most.
    """
    from quantforge import plots  # matplotlib takes a second; reading a record must not

    environment = _environment(lambda value: clean(str(value)), autoescape=True)
    runs = [_cleaned(run) for run in report.runs]
    marks, notes = footnotes(report)
    record = _inline(to_json(report))
    drawings = {
        name: [Markup(plots.svg(draw(runs, width), f"{name}-{size}", f"Plot of {about}"))
               for size, width in (("wide", plots.WIDE), ("narrow", plots.NARROW))]
        for name, draw, about in (
            ("perplexity", plots.perplexity_figure, "perplexity against bits per weight"),
            ("loss", plots.loss_figure, "relative loss by layer"),
        )
    }  # fmt: skip
    return environment.get_template("report.html.j2").render(
        report=report,
        lead=lead(report),
        columns=COLUMNS,
        size=SIZE,
        best=best(report),
        marks=marks,
        footnotes=notes,
        noted=any(run.notes for run in report.runs) or bool(report.model_notes),
        most_series=plots.MOST_SERIES if len(plots.looks(runs)) > plots.MOST_SERIES else None,
        joined=any(len(members) > 1 for members in plots.perplexity_series(runs).values()),
        left_out=_left_out(runs),
        layers=_layers(report),
        experts=experts(report),
        expert_columns=EXPERT_COLUMNS,
        widest=widest(report),
        widest_columns=WIDEST_COLUMNS,
        drawings=drawings,
        record=Markup(record) if len(record) <= MOST_RECORD else None,
    )


def _left_out(runs: list[Run]) -> str:
    """Say which runs and kinds of layer the plot of losses draws, if not all; empty if it does."""
    from quantforge import plots

    shown = plots.loss_runs(runs)
    every, kinds = [run for run in runs if run.layers and run.bits is not None], len(plots.loss_kinds(shown))
    said = []
    if len(shown) < len(every):
        bits = {run.bits for run in shown}
        width = f" at {width_in_words(next(iter(bits)))}" if len(bits) == 1 else ""
        lowest = " with the lowest perplexity" if len(shown) < sum(run.bits in bits for run in every) else ""
        said.append(f"Of {len(every)} runs, the {len(shown)}{width}{lowest} are drawn; the tables below have all.")
    if kinds > plots.MOST_KINDS:
        said.append(f"Of {kinds} kinds of layer, the first {plots.MOST_KINDS} are drawn.")
    return " ".join(said)


def _layers(report: Report) -> list[tuple[Run, tuple[LayerRow, ...]]]:
    """Return each run that has layers with those its table shows: all, or of very many the ones that lose most."""
    runs = [run for run in report.runs if run.layers]
    if sum(len(run.layers) for run in runs) <= MOST_ROWS:
        return [(run, run.layers) for run in runs]
    return [(run, tuple(sorted(run.layers, key=_by_loss)[:FEW_ROWS])) for run in runs]


def _by_loss(layer: LayerRow) -> float:
    return -layer.relative_loss if math.isfinite(layer.relative_loss) else math.inf


def _cleaned(run: Run) -> Run:
    """Clean the names that plots show: they pass through XML, which cannot hold control characters at all."""
    layers = tuple(replace(layer, kind=clean(layer.kind)) for layer in run.layers)
    return replace(run, label=clean(run.label), method=clean(run.method), layers=layers)


def _inline(text: str) -> str:
    """Make JSON short, and safe inside a script element: none of the characters that could end it is left."""
    text = json.dumps(json.loads(text), separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into `folder`; all are made before the first is written."""
    files = {"report.json": to_json(report), "report.md": to_markdown(report), "report.html": to_html(report)}
    for name, text in files.items():
        write_text(folder / name, text)
