"""The templates of the documents."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantforge.report.words import facts, number, plain


def environment(finalize: Callable[[Any], Any], autoescape: bool) -> Environment:
    """Set up templates in which every expression passes through `finalize`; Markup is taken as finished."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent.parent / "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else finalize(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["csp_hash"] = lambda text: f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
    made.globals.update(facts=facts, number=number, plain=plain)
    return made
