"""A sensitivity analysis as Markdown and as one HTML page that loads nothing: heat map, ranked list, check of the sum.

Every name in it is untrusted text: each file escapes what it prints.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quantforge.errors import clean
from quantforge.report.templates import environment
from quantforge.report.words import MISSING, escape_markdown, number, signed
from quantforge.sensitivity.ranking import NOT_SHOWN, Row, kl, ranked, total
from quantforge.sensitivity.results import WHOLE, Analysis, Section, to_json
from quantforge.store import write_text

TOP = 10  # parts of each list in Markdown
MOST_COLUMNS = 16  # of a heat map of layers; of more, those of one kind share a column
ROUNDING = 1e-6  # nats per token
FEW = 6  # windows: below, no test can reach the level
WAYS = {"block": "By block", "kind": "By kind of layer", "layer": "By layer"}


@dataclass(frozen=True)
class HeatCell:
    """One field of a heat map: a mean KL in nats, and how hot it is, from 0 to 100; text is what it says."""

    value: float | None
    text: str
    heat: int


@dataclass(frozen=True)
class HeatMap:
    """A table of mean KL, coloured on a log scale over the whole section."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[HeatCell, ...]], ...]


def heat_maps(section: Section) -> list[HeatMap]:
    """Return a map of parts by formats; by layer, one for each format of blocks by layers within the block."""
    values = {(c.part, c.format): kl(c) for c in section.cells if c.part != WHOLE}
    span = _span([value for value in values.values() if value > 0 and math.isfinite(value)])
    if section.by != "layer":
        rows = tuple(
            (part.name, tuple(_heat(values.get((part.name, fmt)), span) for fmt in section.formats))
            for part in section.parts
        )
        return [HeatMap("", section.by, section.formats, rows)]
    inside = {part.name: _inside(part.name, part.block) for part in section.parts}
    if len(set(inside.values())) > MOST_COLUMNS:
        inside = {name: name.rpartition(".")[2] for name in inside}
    columns = tuple(dict.fromkeys(inside.values()))
    found = []
    for fmt in section.formats:
        fields: dict[tuple[int, str], float] = {}
        for part in section.parts:
            key, value = (part.block, inside[part.name]), values.get((part.name, fmt))
            if value is not None:
                fields[key] = max(fields.get(key, 0.0), value) if math.isfinite(value) else math.nan
        blocks = dict.fromkeys(part.block for part in section.parts)
        rows = tuple((str(b), tuple(_heat(fields.get((b, c)), span) for c in columns)) for b in blocks)
        found.append(HeatMap(fmt, "block", columns, rows))
    return found


def _inside(name: str, block: int) -> str:
    """Return a layer's name within its block."""
    head, dot, rest = name.partition(f".{block}.")
    return rest if dot else head


def _span(values: list[float]) -> tuple[float, float]:
    return (math.log(min(values)), math.log(max(values))) if values else (0.0, 0.0)


def _heat(value: float | None, span: tuple[float, float]) -> HeatCell:
    low, high = span
    if value is None:
        return HeatCell(None, "", 0)
    if not math.isfinite(value):
        return HeatCell(None, "n/a", 100)
    share = (math.log(value) - low) / (high - low) if value > 0 and high > low else float(value > 0)
    return HeatCell(value, nats(value), round(100 * min(max(share, 0.0), 1.0)))


def nats(value: float) -> str:
    """Format a KL: three decimals, two digits where it is small; none of what is no more than rounding."""
    if 0 < value < ROUNDING:
        return f"< {ROUNDING:f}"
    return two_digits(value) if 0 < value < 0.01 else number(value, ".3f")


def two_digits(value: float) -> str:
    """Format a number by its first two digits, without an exponent."""
    return f"{Decimal(f'{value:.1e}'):f}" if math.isfinite(value) else MISSING


def change(value: float) -> str:
    """Format a change of perplexity with its sign."""
    return signed(value, 4 if abs(value) < 1 else 2)


def to_markdown(found: Analysis) -> str:
    """Return the analysis in Markdown: heat map, the parts that matter most, and the check of the sum."""
    made = environment(lambda value: escape_markdown(str(value)), autoescape=False)
    made.globals["verbatim"] = lambda text: Markup(html.escape(clean(text), quote=False))
    return made.get_template("sensitivity.md.j2").render(analysis=found, top=TOP, **_views(found))


def to_html(found: Analysis) -> str:
    """Return the analysis as one HTML page without references to anything outside it."""
    made = environment(lambda value: clean(str(value)), autoescape=True)
    return made.get_template("sensitivity.html.j2").render(analysis=found, **_views(found))


def _views(found: Analysis) -> dict[str, Any]:
    """Return what both templates show, everything computed."""
    lists = {s.by: [(fmt, ranked(s, fmt)) for fmt in s.formats] for s in found.sections}
    totals = {s.by: [t for fmt in s.formats if (t := total(s, fmt)) is not None] for s in found.sections}
    maps = {s.by: heat_maps(s) for s in found.sections}
    said = {
        "lead": lead(found, lists),
        "ways": WAYS,
        "unshown": NOT_SHOWN,
        "few": FEW,
        "nats": nats,
        "change": change,
        "two_digits": two_digits,
    }
    return {"lists": lists, "totals": totals, "maps": maps, "signed": signed, **said}


def lead(found: Analysis, lists: dict[str, list[tuple[str, list[Row]]]]) -> str:
    """Say in words which part costs most, in the format of each section where the most is lost."""
    said = []
    for section in found.sections:
        fullest = [(fmt, rows) for fmt, rows in lists[section.by] if rows and math.isfinite(rows[0].kl)]
        if fullest:
            fmt, rows = max(fullest, key=lambda pair: pair[1][0].kl)
            unsure = f", {NOT_SHOWN} from the next" if rows[0].apart is False else ""
            said.append(f"by {section.by} {rows[0].part} ({fmt}: KL {nats(rows[0].kl)}{unsure})")
    return f"What costs most when it alone is quantized: {'; '.join(said)}." if said else "Nothing was measured."


def summary(found: Analysis, by: tuple[str, ...]) -> str:
    """Return the parts that cost most in each format as lines of plain text."""
    lines = []
    for section in found.sections:
        if section.by not in by:
            continue
        for fmt in section.formats:
            rows = ranked(section, fmt)[:3]
            parts = ", ".join(f"{clean(row.part)} {nats(row.kl)} ± {nats(row.kl_error)}" for row in rows)
            both = total(section, fmt)
            sums = "" if both is None else f"; sum {nats(both.kl)}, whole {nats(both.whole_kl)} ({both.verdict})"
            lines.append(f"by {section.by}, {fmt}: KL {parts}{sums}")
    return "\n".join(lines)


def write(found: Analysis, folder: Path) -> None:
    """Write sensitivity.json, .md and .html into `folder`; all are made before the first is written."""
    for name, text in (
        ("sensitivity.json", to_json(found)),
        ("sensitivity.md", to_markdown(found)),
        ("sensitivity.html", to_html(found)),
    ):
        write_text(folder / name, text)
