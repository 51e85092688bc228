"""How a report says numbers, JSON values and names, in Markdown and elsewhere."""

from __future__ import annotations

import html
import math
import re
from typing import Any

from markupsafe import Markup

from quantforge.errors import clean
from quantforge.record import Run

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


def signed(value: float, digits: int, unit: str = "") -> str:
    """Format a change with its sign, a true minus, and the unit after it; zero has no sign."""
    if not math.isfinite(value):
        return MISSING
    text = f"{abs(value):,.{digits}f}" if abs(value) < 1e6 else f"{abs(value):.1e}"
    sign = "" if float(text.replace(",", "")) == 0 else "−" if value < 0 else "+"
    return f"{sign}{text}{unit}"


def span(low: str, high: str, joint: str = "–") -> str:
    """Join the ends of an interval; empty where one is not known."""
    return "" if MISSING in (low, high) else f"{low}{joint}{high}"


def p_value(p: float) -> str:
    """Say a p-value: three decimals, or that it is at most 0.001."""
    return MISSING if not math.isfinite(p) else "p ≤ 0.001" if p <= 0.001 else f"p = {p:.3f}"


def joined(names: list[str], most: int = 6) -> str:
    """Join names by commas and "and"; of more than `most` the others are counted."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} others"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


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
