"""The plug-in table: a decorator, a lookup with a helpful error, and options checked against the dataclass's fields.

Outside packages add a plug-in by an entry point in the group "quantforge.plugins" that names the module to import.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from quantforge.errors import RecipeError, nearest, pick

KINDS = ("solver", "transform", "tuner", "correction", "exporter")
_BUILT_IN = (
    "quantforge.solvers.rtn",
    "quantforge.solvers.gptq",
    "quantforge.solvers.gptaq",
    "quantforge.solvers.spqr",
    "quantforge.solvers.hqq",
    "quantforge.solvers.quantile",
    "quantforge.solvers.obq",
    "quantforge.solvers.spare",
    "quantforge.transforms.awq",
    "quantforge.transforms.smoothquant",
    "quantforge.tuners.lwc",
    "quantforge.tuners.lkd",
    "quantforge.corrections.lorc",
    "quantforge.exporters.compressed_tensors",
    "quantforge.exporters.bitsandbytes",
    "quantforge.exporters.bitsandbytes8",
    "quantforge.exporters.gptq",
    "quantforge.exporters.awq",
    "quantforge.exporters.gguf",
    "quantforge.exporters.native",
)
_TABLE: dict[tuple[str, str], type] = {}


def register(kind: str, name: str) -> Callable[[type], type]:
    """Enter a frozen dataclass as the plug-in `name`; its fields are its options, its docstring its documentation."""

    def enter(cls: type) -> type:
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of plug-in; there are {', '.join(KINDS)}")
        _TABLE[kind, name] = cls
        return cls

    return enter


@cache
def _load() -> None:
    for module in _BUILT_IN:
        import_module(module)
    for point in entry_points(group="quantforge.plugins"):
        point.load()


def names(kind: str) -> list[str]:
    """Return the names of all plug-ins of `kind`, sorted."""
    _load()
    return sorted(n for k, n in _TABLE if k == kind)


def find(kind: str, name: str) -> type:
    """Return the class registered as `name`; RecipeError with the nearest name if there is none."""
    return _TABLE[kind, pick(kind, name, names(kind))]


def options(kind: str, name: str) -> dict[str, tuple[str, Any]]:
    """Return {option: (type, default)} of a plug-in, in order."""
    return {f.name: (str(f.type), _default(f)) for f in fields(find(kind, name))}


def _default(f: Field[Any]) -> Any:
    return None if f.default is MISSING else f.default


def create(kind: str, name: str, settings: dict[str, Any] | None = None) -> Any:
    """Build a plug-in with `settings`; unknown options and values of the wrong type or range are RecipeErrors."""
    cls = find(kind, name)
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}
    checked = {}
    for key, value in (settings or {}).items():
        if key not in known:
            hint = nearest(key, known)
            raise RecipeError(
                202, f"{kind} {name!r} has no option {key!r}: {hint}it has: {', '.join(known) or 'none'}."
            )
        checked[key] = coerce(f"{kind}.{key}", value, known[key])
    try:
        return cls(**checked)
    except ValueError as error:
        raise RecipeError(203, f"{kind} {name!r}: {error}") from error


def coerce(where: str, value: Any, kind: type) -> Any:
    """Turn text from the command line, or a value from YAML, into the option's type."""
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, str) and kind is bool and value.lower() in words:
        return words[value.lower()]
    try:
        if isinstance(value, str) and kind in (int, float):
            return kind(value)
    except ValueError:
        pass
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise RecipeError(204, f"{where} must be of type {kind.__name__}, not {value!r}.")
    return value
