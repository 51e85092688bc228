"""The YAML definitions that come with quantforge: where they lie, and how they become frozen dataclasses."""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from quantforge.errors import DataError, ResourceError, nearest

KINDS = ("calib", "eval")
MAX_YAML = 200_000  # bytes, some seconds of reading
MAX_ALIASES = 20  # of which few enough can be nested to stay small when written out
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
    """Read a YAML file that holds one mapping with text keys; DataError if it holds anything else.

    The file may come from a stranger: it must be small and regular, without a key twice, and with few aliases.
    """
    try:
        info = os.stat(path)
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_YAML:
            raise DataError(420, f"{path.name} must be an ordinary file of at most {MAX_YAML:,} bytes.")
        return parse_mapping(path.read_bytes(), path.name)
    except OSError as error:
        raise DataError(420, f"{path.name} cannot be read: {error.strerror or error}.") from error


def parse_mapping(raw: bytes, name: str) -> dict[str, Any]:
    """Parse YAML in UTF-8 that holds one mapping with text keys; DataError naming `name` if it is anything else."""
    try:
        values = _Strict(raw.decode("utf-8")).get_single_data()
    except RecursionError as error:
        raise DataError(420, f"{name} cannot be read as YAML: it is nested too deeply.") from error
    # what is no value of its tag, such as the date 2001-99-99, raises whatever its constructor does
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(420, f"{name} cannot be read as YAML: {str(error)[:500]}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise DataError(420, f"{name} must hold one mapping of keys to values, not {type(values).__name__}.")
    return values


class _Strict(yaml.SafeLoader):
    """Makes plain values only, and refuses a key that stands twice, and more than MAX_ALIASES aliases."""

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MAX_ALIASES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_ALIASES} aliases", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


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
