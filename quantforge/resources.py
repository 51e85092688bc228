"""The YAML definitions that come with quantforge: where they lie, and how they become frozen dataclasses."""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from quantforge.errors import DataError, ResourceError, nearest

KINDS = ("calib", "eval")
T = TypeVar("T")


def data_dir(kind: str) -> Path:
    """Return the folder of `kind` ("calib" or "eval"): the installed copy, else the one of a source checkout.

    Raises ResourceError if there is neither, ValueError if `kind` is none of the two.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of data; there are {', '.join(KINDS)}")
    package = Path(__file__).resolve().parent
    for folder in (package / "data" / kind, package.parent / kind):
        if folder.is_dir():
            return folder
    raise ResourceError(520, f"the folder {kind!r} of quantforge's own files is missing: install quantforge again.")


def cache_dir() -> Path | None:
    """Return the folder for what can be made anew: $QUANTFORGE_CACHE, else the user's cache; None if that is empty."""
    named = os.environ.get("QUANTFORGE_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "quantforge"


def definitions(kind: str) -> dict[str, Path]:
    """Return {name: YAML file} of all definitions of `kind`, sorted by name."""
    return {path.stem: path for path in sorted(data_dir(kind).glob("*.yaml"))}


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping with text keys; DataError if it holds anything else."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(420, f"{path.name} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise DataError(420, f"{path.name} must hold one mapping of keys to values, not {type(values).__name__}.")
    return values


def build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Make the frozen dataclass `cls` of `values`; `where` names the file in errors.

    Keys must be fields, fields without a default must be given, and values must have exactly the field's type (or one
    of its types, as in `int | None`); anything else is a DataError. A ValueError of `cls` itself becomes one, too.
    """
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise DataError(421, f"{where} has an unknown key {key!r}: {nearest(key, known)}Known: {', '.join(known)}.")
        kinds = get_args(hints[key]) if isinstance(hints[key], UnionType) else (hints[key],)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise DataError(422, f"{where}: {key} must be of type {names}, not {value!r}.")
    for f in fields(cls):  # type: ignore[arg-type]
        if f.default is MISSING and f.name not in values:
            raise DataError(423, f"{where} lacks the key {f.name!r}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise DataError(424, f"{where}: {error}") from error
