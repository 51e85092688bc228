"""The comparison report: one record of runs, written as JSON, as Markdown and as one self-contained HTML page.

The record is made of frozen dataclasses and is all that the three files are made from, so that the same record gives
the same bytes. Every name in it is untrusted text: each file escapes what it prints.
"""

from __future__ import annotations

import html
import json
import math
import os
import platform
import re
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from reprlib import repr as short
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantforge.errors import DataError, nearest
from quantforge.store import write_text

SCHEMA = 1
PACKAGES = ("quantforge", "torch", "transformers", "compressed-tensors", "safetensors", "gguf", "numpy")
MISSING = "n/a"
UNIONS = (UnionType, Union)

Note = bool | int | float | str | None


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    kind           the last part of the name that repeats over depth: "q_proj", "down_proj"
    block          how deep it lies, from 0; None outside the repeated blocks
    loss           tr(ΔW H ΔWᵀ), the squared error of the layer's outputs over the calibration tokens
    relative_loss  loss / tr(W H Wᵀ), the share of the layer's output energy
    notes          facts about the solve, such as {"damp": 0.01, "dead_columns": 0}
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, int]
    format: str
    bits_per_weight: float
    loss: float
    relative_loss: float
    notes: dict[str, Note]


@dataclass(frozen=True)
class Run:
    """One method at one width. NaN stands for what was not measured, and is all that is kept of an infinity.

    bits              of a code; None for the float model
    bits_per_weight   over the quantized layers, scales and zeros counted
    kl                mean KL divergence from the float model, nats per token
    seconds           of quantizing
    peak_memory_bytes above the loaded model
    disk_note         what there is to say about the size, such as why the model was not saved
    notes             warnings worth reading
    """

    label: str
    method: str
    bits: int | None
    bits_per_weight: float
    perplexity: float
    kl: float
    seconds: float
    peak_memory_bytes: int | None
    bytes_on_disk: int | None
    disk_note: str
    options: dict[str, Any]
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """All runs on one model, and what somebody needs to repeat them; dictionaries hold JSON values only."""

    schema: int
    model: str
    model_notes: tuple[str, ...]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    protocol: str
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    created: str
    runs: tuple[Run, ...]


def machine() -> dict[str, Any]:
    """Describe this machine: processor, cores, threads, memory, platform, accelerator; no names of host or user."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"processor": _processor(), "cores": usable, "threads": torch.get_num_threads()}
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        facts["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def to_json(report: Report) -> str:
    """Return the record as JSON in ASCII, floats in full; what is not finite becomes null."""
    return json.dumps(_finite(asdict(report)), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(text: str) -> Report:
    """Read what `to_json` wrote; null becomes NaN where a number is due. DataError 430 says which field is wrong."""
    try:
        data = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(430, f"the report is not JSON: {error}.") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise DataError(430, "the file is not a report: it has no field 'schema'; give a report.json.")
    if type(data["schema"]) is not int or data["schema"] != SCHEMA:
        found = short(data["schema"])
        raise DataError(430, f"the report has schema {found}, this version reads {SCHEMA}; run the comparison again.")
    report: Report = _read("report", data, Report)
    return report


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _read(where: str, value: Any, hint: Any) -> Any:
    """Check `value`, as parsed from JSON, against the annotation `hint`, and return it as that type."""
    arguments, origin = get_args(hint), get_origin(hint)
    if hint is Any or (origin in UNIONS and type(value) in arguments):
        return value
    if is_dataclass(hint):
        return _record(where, _expect(where, value, dict), hint)
    if hint is float:
        try:
            return math.nan if value is None else float(_expect(where, value, float, int))
        except OverflowError as error:
            raise DataError(430, f"{where} is too large a number.") from error
    if origin is dict:
        return {k: _read(f"{where}[{short(k)}]", v, arguments[1]) for k, v in _expect(where, value, dict).items()}
    if origin is tuple:
        items = _expect(where, value, list)
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise DataError(430, f"{where} must have {len(arguments)} items, not {len(items)}.")
        return tuple(_read(f"{where}[{i}]", item, arguments[0]) for i, item in enumerate(items))
    return _expect(where, value, *(arguments if origin in UNIONS else (hint,)))


def _expect(where: str, value: Any, *types: type) -> Any:
    if type(value) in types:
        return value
    names = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", type(None): "null"}
    wanted = " or ".join(names.get(t, t.__name__) for t in types if t is not int or float not in types)
    raise DataError(430, f"{where} must be {wanted}, not {short(value)}.")


def _record(where: str, data: dict[str, Any], cls: Any) -> Any:
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    for key in data:
        if key not in known:
            raise DataError(
                430, f"{where} has a field {short(key)}: {nearest(key, known)}It may have: {', '.join(known)}."
            )
    for key in known:
        if key not in data:
            raise DataError(430, f"{where} lacks the field {key!r}.")
    return cls(**{key: _read(f"{where}.{key}", data[key], hints[key]) for key in known})


def clean(text: str) -> str:
    """Spell out what would steer a terminal, a browser or the direction of text; white space becomes one space."""
    text = " ".join(text.split())
    return "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else _spelled(c) for c in text)


def _spelled(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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
