"""The comparison report: one record of runs, written as JSON, as Markdown and as one self-contained HTML page.

The record is made of frozen dataclasses and is all that the three files are made from, so that the same record gives
the same bytes. Every name in it is untrusted text: each file escapes what it prints.
"""

from __future__ import annotations

import html
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
from quantforge.record import Report, Run, to_json
from quantforge.store import write_text

MISSING = "n/a"


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
    Column("bits/weight", "bits per weight, scales and zeros counted", lambda r: r.bits_per_weight,
           lambda r: number(r.bits_per_weight, ".3f")),
    Column("perplexity", "on the evaluation text; lower is better", lambda r: r.perplexity,
           lambda r: perplexity(r.perplexity)),
    Column("KL", "mean KL divergence from the float model, nats per token", lambda r: r.kl,
           lambda r: number(r.kl, "z.4f")),
    Column("size (MB)", "of the saved model, 10⁶ bytes", lambda r: r.bytes_on_disk,
           lambda r: number(r.bytes_on_disk, ".1f", 1e6)),
    Column("seconds", "to quantize", lambda r: r.seconds, lambda r: number(r.seconds, ".1f")),
    Column("peak memory (MB)", "above the loaded model, 10⁶ bytes", lambda r: r.peak_memory_bytes,
           lambda r: number(r.peak_memory_bytes, ".1f", 1e6)),
)  # fmt: skip


def table(report: Report) -> str:
    """Return the table of results alone, in Markdown, one row per run."""
    rows = [[escape_markdown(column.text(run)) for column in COLUMNS] for run in report.runs]
    return _grid([Markup(column.heading) for column in COLUMNS], rows)


def _grid(headings: list[Markup], rows: list[list[Markup]]) -> str:
    """Lay out a Markdown table that is aligned as plain text too: the first column left, numbers right."""
    widths = [max(3, *map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    lines = [_line(headings, widths), _line(["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])], widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)]) + "\n"


def _line(cells: Iterable[str], widths: list[int]) -> str:
    padded = [f"{c!s:<{w}}" if i == 0 else f"{c!s:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
    return f"| {' | '.join(padded)} |"


def worth_reading(run: Run) -> list[str]:
    """Return a run's warnings, with what there is to say about its size."""
    return [*run.notes, *([f"Size: {run.disk_note}"] if run.disk_note else [])]


def best(report: Report) -> set[int]:
    """Return the places of the runs with the lowest perplexity of their width, where a width has several."""
    found = set()
    for bits in {run.bits for run in report.runs if run.bits is not None}:
        places = [i for i, r in enumerate(report.runs) if r.bits == bits and math.isfinite(r.perplexity)]
        if len(places) > 1:
            found.add(min(places, key=lambda i: report.runs[i].perplexity))
    return found


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
    environment.globals.update(
        facts=facts, number=number, perplexity=perplexity, plain=plain, worth_reading=worth_reading
    )
    return environment


def to_markdown(report: Report) -> str:
    """Return the report in Markdown: the table of results, the losses by kind of layer, and how to repeat it."""
    command = Markup(html.escape(clean(report.command), quote=False))
    environment = _environment(lambda value: escape_markdown(str(value)), autoescape=False)
    return environment.get_template("report.md.j2").render(
        report=report, table=Markup(table(report)), losses=Markup(_losses(report)), command=command
    )


def _losses(report: Report) -> str:
    """Return a Markdown table of the mean relative loss per run and kind of layer; empty if no run has layers."""
    runs = [run for run in report.runs if run.layers]
    kinds = list(dict.fromkeys(layer.kind for run in runs for layer in run.layers))
    rows = [
        [escape_markdown(run.label), *(Markup(number(_mean_loss(run, kind), ".2e")) for kind in kinds)] for run in runs
    ]
    return _grid([Markup("method"), *map(escape_markdown, kinds)], rows) if rows else ""


def _mean_loss(run: Run, kind: str) -> float:
    losses = [layer.relative_loss for layer in run.layers if layer.kind == kind]
    return math.fsum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else math.nan


def to_html(report: Report) -> str:
    """Return the report as one HTML page that loads nothing: styles, script, plots and the record are inside."""
    from quantforge import plots  # matplotlib takes a second; reading a record must not

    environment = _environment(lambda value: clean(str(value)), autoescape=True)
    template = environment.get_template("report.html.j2")
    runs = [_cleaned(run) for run in report.runs]
    return template.render(
        report=report,
        columns=COLUMNS,
        best=best(report),
        warned=any(worth_reading(run) for run in report.runs),
        perplexity_plot=Markup(plots.svg(plots.perplexity_figure(runs), "perplexity")),
        loss_plot=Markup(plots.svg(plots.loss_figure(runs), "loss")),
        record=Markup(_inline(to_json(report))),
    )


def _cleaned(run: Run) -> Run:
    """Clean the names that plots show: they pass through XML, which cannot hold control characters at all."""
    layers = tuple(replace(layer, kind=clean(layer.kind)) for layer in run.layers)
    return replace(run, label=clean(run.label), method=clean(run.method), layers=layers)


def _inline(text: str) -> str:
    """Make JSON safe inside a script element: none of the characters that could end it is left."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html into `folder`; all are made before the first is written."""
    files = {"report.json": to_json(report), "report.md": to_markdown(report), "report.html": to_html(report)}
    for name, text in files.items():
        write_text(folder / name, text)
