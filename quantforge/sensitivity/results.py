"""What a sensitivity analysis has found, its JSON with a versioned schema, and the check that results go together.

Every name in it is untrusted text: whatever prints it must escape it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from quantforge import record
from quantforge.errors import DataError, PlanError
from quantforge.evaluation.reference import CLOSE

SCHEMA = 2
FILE = "sensitivity.json"
WHOLE = ""  # the part that is everything


@dataclass(frozen=True)
class PartRow:
    """One part of the model.

    name     of the block, the kind of layer or the layer
    block    the first decoder block that it lies in
    layers   how many it has; weights: how many they hold together
    """

    name: str
    block: int
    layers: int
    weights: int


@dataclass(frozen=True)
class Cell:
    """One part in one format, the rest of the model in float.

    part     its name; "" for all parts at once
    format   how its weights (and inputs) are stored
    losses   mean cross-entropy of each window, nats per token
    kls      mean KL from the float model of each window, nats per token: a lower bound from its most probable tokens
    seconds  to quantize the part and to measure it
    """

    part: str
    format: str
    losses: tuple[float, ...]
    kls: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Section:
    """The model cut into parts in one way, and every cell that has been measured so far.

    by           "block", "kind" or "layer"
    evaluation   where the tokens came from
    fingerprint  of the model's files, and of what computed with them; "" for a model in memory
    losses       of the float model on each window, nats per token
    formats      in the order of the columns
    """

    by: str
    evaluation: dict[str, Any]
    versions: dict[str, str]
    fingerprint: str
    machine: dict[str, Any]
    command: str
    created: str
    losses: tuple[float, ...]
    formats: tuple[str, ...]
    parts: tuple[PartRow, ...]
    cells: tuple[Cell, ...]

    def cell(self, part: str, fmt: str) -> Cell | None:
        """Return the cell of a part in a format, or None if it has not been measured."""
        return next((c for c in self.cells if (c.part, c.format) == (part, fmt)), None)


@dataclass(frozen=True)
class Analysis:
    """Everything that is known of one model and method; dictionaries hold JSON values.

    options  what all columns have in common: options of the method's parts, inputs, overrides as they were asked for
    columns  what each format was made with, its overrides in full: only a cell made so can be taken over
    """

    schema: int
    model: str
    model_notes: tuple[str, ...]
    method: str
    options: dict[str, Any]
    columns: dict[str, dict[str, Any]]
    sections: tuple[Section, ...]

    def section(self, by: str) -> Section | None:
        """Return the section of one way to cut the model, or None."""
        return next((s for s in self.sections if s.by == by), None)

    def having(self, section: Section) -> Analysis:
        """Return the same with `section` in the place of the one by the same parts, or at the end."""
        if self.section(section.by) is None:
            return replace(self, sections=(*self.sections, section))
        return replace(self, sections=tuple(section if s.by == section.by else s for s in self.sections))


def to_json(found: Analysis) -> str:
    """Return it as JSON in ASCII, floats in full; what is not finite becomes null."""
    return json.dumps(record.finite(asdict(found)), allow_nan=False) + "\n"


def from_json(text: str) -> Analysis:
    """Read what `to_json` wrote; DataError 490 says what is wrong."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(490, f"{FILE} is not JSON: {error}.") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise DataError(490, f"{FILE} has schema {schema!r}, and this version reads {SCHEMA}; choose another folder.")
    found: Analysis = record.read_value(FILE.removesuffix(".json"), data, Analysis)
    for section in found.sections:
        for cell in section.cells:
            if not len(section.losses) == len(cell.losses) == len(cell.kls) > 0:
                raise DataError(490, f"{FILE}: {cell.part!r} at {cell.format!r} has losses of other windows.")
    return found


def read(out: Path) -> Analysis | None:
    """Return what the folder `out` holds of earlier runs, or None. Raises DataError if it cannot be read."""
    try:
        return from_json((out / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(490, f"{out / FILE} cannot be read: {error}.") from error


def check_same(out: Path, earlier: Analysis, found: Analysis) -> None:
    """Raise PlanError, naming what differs, unless new results can go beside the earlier ones."""
    for name in ("model", "method", "options"):
        _same(out, name, getattr(earlier, name), getattr(found, name))
    for fmt in earlier.columns.keys() & found.columns.keys():
        _same(out, f"options of {fmt}", earlier.columns[fmt], found.columns[fmt])
    for section in found.sections:
        old = earlier.section(section.by)
        if old is not None:
            where = f" by {section.by}"
            for key in sorted(old.evaluation.keys() | section.evaluation.keys(), key=_plainest):
                _same(out, f"text ({key}){where}", old.evaluation.get(key), section.evaluation.get(key))
            for key in old.versions.keys() | section.versions.keys():
                _same(out, f"version of {key}{where}", old.versions.get(key), section.versions.get(key))
            _same(out, f"parts{where}", old.parts, section.parts)
        _check_files(out, earlier, section)


def _check_files(out: Path, earlier: Analysis, section: Section) -> None:
    """Raise PlanError if a section by whatever parts is of other files; with other versions none can be told."""
    for old in earlier.sections:
        if old.versions == section.versions and old.fingerprint != section.fingerprint:
            raise PlanError(
                291, f"{out} has results by {old.by} of other model files, or another device; choose another folder."
            )


def check_losses(section: Section, losses: tuple[float, ...]) -> None:
    """Raise PlanError if the float model's losses (nats, by window) are not those recorded: it is another model."""
    for i, (old, new) in enumerate(zip_longest(section.losses, losses, fillvalue=math.nan)):
        if math.isfinite(old) != math.isfinite(new) or abs(old - new) > CLOSE:
            raise PlanError(
                291,
                f"the float model loses {new:.4f} nats on window {i}, and {old:.4f} when results by {section.by} were "
                "made: it has changed; choose another folder.",
            )


def _plainest(key: str) -> tuple[int, str]:
    """Sort what says most to a reader first, digests last."""
    order = ("name", "path", "seq_len", "count")
    return (order.index(key) if key in order else len(order), key)


def _same(out: Path, name: str, old: Any, new: Any) -> None:
    if old != new:
        if isinstance(old, tuple | dict):
            raise PlanError(291, f"{out} was made with another {name}; choose another folder.")
        raise PlanError(291, f"{out} was made with another {name}, {old!r}, not {new!r}; choose another folder.")
