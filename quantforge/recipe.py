"""Recipes: a named method with its format and options, from bundled YAML files and the user's changes to them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

import yaml

from quantforge import registry
from quantforge.errors import RecipeError, nearest, pick
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.grids import Grid, IntGrid, int_grid, narrow_grid, nf_grid
from quantforge.numerics.inputs import Inputs, parse_inputs
from quantforge.protocols import Correction, Solver, Transform, Tuner

CACHE = "kv:"
INPUT_OPTIONS: dict[str, type] = {"threshold": float, "dynamic": bool}
DEFAULT_WEIGHTS = "int4-g64-asym"
_FIELDS = ("about", "paper", "weights", "inputs", "solver", "transforms", "tuners", "corrections", "skip")
_PARTS = {"solver": "solver", "transform": "transforms", "tuner": "tuners", "correction": "corrections"}
_Slot = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    name         the method's name, or several joined by "+"
    about        a sentence
    paper        authors, venue, arXiv number
    weights      how linear layers are stored; the dtype of scales is set to the checkpoint's when the plan is made
    solver       how codes are chosen
    transforms   what is done to the float model first
    tuners       what is trained about each block before it is rounded
    corrections  what is added to each layer's result
    skip         names of layers that stay as they are, full or by their last part
    inputs       how layers round their inputs when they are called; None: not at all
    overrides    (pattern, recipe for the layers it matches, or None to leave them alone); the last one that matches
    wins
    """

    name: str
    about: str
    paper: str
    weights: Format
    solver: Solver
    transforms: tuple[Transform, ...] = ()
    tuners: tuple[Tuner, ...] = ()
    corrections: tuple[Correction, ...] = ()
    skip: tuple[str, ...] = ("lm_head",)
    inputs: Inputs | None = None
    overrides: tuple[tuple[str, Recipe | None], ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics that any part of it, or of its overrides, wants collected."""
        parts = [part for _, part in self.parts()]
        parts += [other for _, other in self.overrides if other is not None]
        parts += [self.inputs] if self.inputs else []
        return tuple(sorted({need for part in parts for need in part.needs}))

    @property
    def label(self) -> str:
        """Return the method and its format in one word."""
        inputs = f"-x-{self.inputs.short}" if self.inputs else ""
        return f"{self.name}-{self.weights.short}{inputs}"

    def parts(self) -> list[tuple[str, Any]]:
        """Return every part with its kind, which is the prefix that `--set` knows it by."""
        many = {"transform": self.transforms, "tuner": self.tuners, "correction": self.corrections}
        return [("solver", self.solver), *((kind, part) for kind, parts in many.items() for part in parts)]

    def options(self) -> dict[str, dict[str, Any]]:
        """Return the options of every part, by kind."""
        found: dict[str, dict[str, Any]] = {}
        for kind, part in self.parts():
            found.setdefault(kind, {}).update(_values(part))
        return found


def _values(part: object) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for f in fields(part)}  # type: ignore[arg-type]


def names() -> list[str]:
    """Return the names of the bundled recipes, sorted."""
    folder = resources.files("quantforge") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(
    name: str,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    weights: str | None = None,
    inputs: str | None = None,
    settings: dict[str, Any] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    fix: Callable[[Format], Format] | None = None,
) -> Recipe:
    """Return the bundled recipe `name`, changed as asked; "awq+gptq" joins two that fill different slots.

    bits        2 to 8; None keeps the recipe's
    group_size  weights along the input that share a scale; -1 is a whole row (per channel)
    symmetric   True: no zero points
    weights     the notation of a format, "int4-g64-asym", "e4m3-channel", "mxfp4"; None keeps the recipe's
    inputs      how layers round their inputs: "int8-token", "int8-tensor-static", "e4m3-token"; "float": not at all
    settings    {"solver.damp_percent": 0.01, …}: options of the recipe's parts
    overrides   {pattern of layer names: {"bits": 8, "group_size": 32, "method": "rtn", "skip": True}}
    fix         what a container makes of a format, where none of the above says otherwise

    Raises RecipeError for an unknown recipe, option or value, with the nearest name.
    """
    raw = _join(name, [_read(part) for part in name.split("+")])
    slots = {
        "solver": [_slot(raw["solver"])],
        "transforms": [_slot(s) for s in raw["transforms"]],
        "tuners": [_slot(s) for s in raw["tuners"]],
        "corrections": [_slot(s) for s in raw["corrections"]],
    }
    rounding = _inputs(raw["inputs"], inputs)
    for key, value in (settings or {}).items():
        if rounding is not None and key.startswith("inputs."):
            rounding = _adjust(rounding, key.removeprefix("inputs."), value)
        else:
            _set(slots, key, value)
    if rounding is not None and rounding.dynamic and not math.isfinite(rounding.threshold):
        raise RecipeError(
            222, "inputs.dynamic finds channels above a threshold, and there is none; set inputs.threshold=6."
        )
    built = {
        kind: tuple(registry.create(kind, plug_in, options) for plug_in, options in slots[field])
        for kind, field in _PARTS.items()
    }
    asked = (bits, group_size, symmetric)
    chosen = Recipe(
        name,
        raw["about"],
        raw["paper"],
        _fixed(_change(_weights(weights or raw["weights"]), *asked), fix, *asked, named=weights is not None),
        built["solver"][0],
        built["transform"],
        built["tuner"],
        built["correction"],
        tuple(raw["skip"]),
        rounding,
    )
    others = tuple(
        (pattern, _override(chosen, pattern, wish, (*asked, weights, inputs), settings, fix))
        for pattern, wish in (overrides or {}).items()
    )
    return replace(chosen, overrides=others)


@dataclass(frozen=True)
class Wish:
    """One row of a suite: a method, what `load` takes besides, and optionally the notation of another format.

    A method that begins with "kv:" is no recipe but a cache to decode through.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    settings: dict[str, Any] | None = None
    format: str | None = None
    inputs: str | None = None
    overrides: dict[str, dict[str, Any]] | None = None

    def recipe(self) -> Recipe:
        """Return the recipe that is asked for."""
        return load(
            self.method,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            weights=self.format,
            inputs=self.inputs,
            settings=self.settings,
            overrides=self.overrides,
        )

    @property
    def cache(self) -> str | None:
        """Return the notation of the cache to decode through; None for a recipe."""
        return self.method.removeprefix(CACHE) if self.method.startswith(CACHE) else None

    @property
    def label(self) -> str:
        """Return the recipe's label with the settings and overrides that set it apart; of a cache, its own name."""
        if self.cache is not None:
            return self.method
        extra = [f"{key.rpartition('.')[2]}={value}" for key, value in (self.settings or {}).items()]
        for pattern, wish in (self.overrides or {}).items():
            extra.append(f"{pattern}={','.join(map(str, wish.values()))}")
        return " ".join([self.recipe().label, *dict.fromkeys(extra)])


def suites() -> list[str]:
    """Return the names of the bundled suites, sorted."""
    folder = resources.files("quantforge") / "recipes" / "suites"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def suite(name: str) -> list[Wish]:
    """Return the rows of a bundled suite."""
    text = (resources.files("quantforge") / "recipes" / "suites" / f"{name}.yaml").read_text(encoding="utf-8")
    return [Wish(**row) for row in yaml.safe_load(text)]


def _read(name: str) -> dict[str, Any]:
    pick("method", name, names())
    raw = _bundled(name)
    found: dict[str, Any] = {
        "weights": DEFAULT_WEIGHTS,
        "inputs": None,
        "solver": "rtn",
        "transforms": [],
        "tuners": [],
        "corrections": [],
    }
    return {**found, "skip": ["lm_head"], **raw}


@functools.cache
def _bundled(name: str) -> dict[str, Any]:
    text = (resources.files("quantforge") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    raw: dict[str, Any] = yaml.safe_load(text)
    assert set(raw) <= set(_FIELDS), f"bundled recipe {name} has unknown fields"
    return raw


def _join(name: str, raws: list[dict[str, Any]]) -> dict[str, Any]:
    """Fill each slot from the one recipe that has something of its own to put there."""
    parts = name.split("+")
    if len(set(parts)) < len(parts):
        raise RecipeError(214, f"{name!r} names a method twice.")
    joined = dict(raws[0])
    for raw in raws[1:]:
        if raw["inputs"] is not None and joined["inputs"] not in (None, raw["inputs"]):
            raise RecipeError(214, f"{name!r} joins methods that each say how inputs are rounded; name one of them.")
        joined["inputs"] = joined["inputs"] or raw["inputs"]
        for slot, plain in (("weights", (DEFAULT_WEIGHTS,)), ("solver", ("rtn",))):
            if raw[slot] in plain or raw[slot] == joined[slot]:
                continue
            rounding = slot == "solver" and "rtn" in (_slot(raw[slot])[0], _slot(joined[slot])[0])
            if joined[slot] not in plain and not rounding:
                what = "how weights are stored" if slot == "weights" else "how codes are chosen"
                raise RecipeError(214, f"{name!r} joins methods that each say {what}; name one of them.")
            if not (rounding and _slot(raw[slot])[0] == "rtn" and joined[slot] not in plain):
                joined[slot] = raw[slot]
        for slot in ("transforms", "tuners", "corrections"):
            joined[slot] = joined[slot] + raw[slot]
        joined["about"] += f"; then: {raw['about'][0].lower()}{raw['about'][1:]}"
        joined["paper"] += f"; {raw['paper']}"
    return joined


def _inputs(raw: Mapping[str, Any] | str | None, asked: str | None) -> Inputs | None:
    """Return how inputs are rounded; None for "float" or nothing.

    raw    the recipe's notation, or {"format": …, "threshold": …}
    asked  the user's notation, which replaces the recipe's format
    """
    own: dict[str, Any] = {"format": raw} if isinstance(raw, str) else dict(raw or {"format": "float"})
    text = asked or own["format"]
    if text == "float":
        return None
    try:
        return replace(parse_inputs(text), **{k: v for k, v in own.items() if k != "format"})
    except ValueError as error:
        raise RecipeError(222, f"inputs: {error}.") from error


def _adjust(rounding: Inputs, option: str, value: Any) -> Inputs:
    """Return `rounding` with one of the user's settings."""
    if option not in INPUT_OPTIONS:
        hint = nearest(option, INPUT_OPTIONS)
        raise RecipeError(222, f"inputs have no option {option!r}: {hint}there are: {', '.join(INPUT_OPTIONS)}.")
    try:
        return replace(rounding, **{option: registry.coerce(f"inputs.{option}", value, INPUT_OPTIONS[option])})
    except ValueError as error:
        raise RecipeError(222, f"inputs: {error}.") from error


def slots(name: str) -> list[tuple[str, str]]:
    """Return the parts of the bundled recipe `name`: their kinds and the names they are registered by."""
    raw = _read(name)
    many = [(kind, _slot(s)[0]) for kind, field in _PARTS.items() if kind != "solver" for s in raw[field]]
    return [("solver", _slot(raw["solver"])[0]), *many]


def _slot(slot: str | dict[str, dict[str, Any]]) -> _Slot:
    name, options = (slot, {}) if isinstance(slot, str) else next(iter(slot.items()))
    return name, dict(options)


def _set(slots: dict[str, list[_Slot]], key: str, value: Any) -> None:
    """Put one of the user's settings into the slot that has it."""
    part, _, option = key.partition(".")
    there = [(kind, slot) for kind, field in _PARTS.items() for slot in slots[field]]
    known = [f"{kind}.{o}" for kind, (name, _) in there for o in registry.options(kind, name)]
    own = [(kind, slot) for kind, slot in there if kind == part]
    if not own or not option:
        raise RecipeError(205, f"there is no setting {key!r}: {nearest(key, known)}there are: {', '.join(known)}.")
    having = [slot for kind, slot in own if option in registry.options(kind, slot[0])]
    for _, options in having or [own[0][1]]:  # where none has it, creating the plug-in says so
        options[option] = value


def _override(
    base: Recipe,
    pattern: str,
    wish: Mapping[str, Any],
    shared: tuple[Any, ...],
    settings: dict[str, Any] | None,
    fix: Callable[[Format], Format] | None,
) -> Recipe | None:
    """Return the recipe of the layers that `pattern` matches: the base's, but for what is wished; None to skip them."""
    shapes: dict[str, type] = {"bits": object, "group_size": object, "symmetric": object, "weights": str, "inputs": str}
    kinds = {**shapes, "method": str, "skip": bool}
    if not isinstance(wish, Mapping):
        raise RecipeError(215, f"the override {pattern!r} must say what is other, such as {{'bits': 8}}, not {wish!r}.")
    for key, value in wish.items():
        if key not in kinds:
            raise RecipeError(
                215, f"the override {pattern!r} has no {key!r}: {nearest(key, kinds)}there are: {', '.join(kinds)}."
            )
        if not isinstance(value, kinds[key]):
            raise RecipeError(215, f"{key} of the override {pattern!r} must be {kinds[key].__name__}, not {value!r}.")
    if wish.get("skip"):
        return None
    method = wish.get("method", base.name)
    bits, group_size, symmetric, weights, inputs = (wish.get(k, v) for k, v in zip(shapes, shared, strict=True))
    same = method == base.name
    other = load(
        method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        weights=weights,
        inputs=inputs,
        settings=_applying(settings, inputs) if same else None,
        fix=fix,
    )
    if not same and (other.transforms or other.tuners):
        raise RecipeError(
            220, f"the override {pattern!r} asks for {method}, which works on whole blocks; make it the method instead."
        )
    return other


def _applying(settings: dict[str, Any] | None, inputs: str | None) -> dict[str, Any]:
    """Return the settings that still apply where inputs are left in float."""
    return {k: v for k, v in (settings or {}).items() if inputs != "float" or not k.startswith("inputs.")}


def _weights(text: str) -> Format:
    try:
        return parse(text)
    except ValueError as error:
        raise RecipeError(224, f"weights: {error}; `quantforge formats` lists them.") from error


def _change(fmt: Format, bits: int | None, group_size: int | None, symmetric: bool | None) -> Format:
    if bits is not None:
        fmt = replace(fmt, grid=_widen(fmt.grid, bits))
    if group_size is not None:
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise RecipeError(207, f"group size must be at least 1, or -1 for a whole row, not {group_size!r}.")
        if isinstance(fmt.block, Flat) and group_size != -1:
            fmt = replace(fmt, block=Flat(group_size))
        else:
            fmt = replace(fmt, block=(1, None if group_size == -1 else group_size))
    if symmetric is not None and type(symmetric) is not bool:
        raise RecipeError(216, f"symmetric must be True or False, not {symmetric!r}.")
    if symmetric is False and not isinstance(fmt.grid, IntGrid):
        raise RecipeError(216, f"{fmt.grid.name} has no zero points; leave --asymmetric out.")
    if symmetric is None or symmetric == fmt.symmetric:
        return fmt
    if fmt.zero is not None:
        raise RecipeError(216, f"{fmt} needs its zero points; leave --symmetric out.")
    return replace(fmt, symmetric=symmetric)


def _fixed(
    fmt: Format,
    fix: Callable[[Format], Format] | None,
    bits: int | None,
    group_size: int | None,
    symmetric: bool | None,
    *,
    named: bool,
) -> Format:
    """Return what a container makes of `fmt`, but for what the user asked for: all of it if the format was `named`."""
    if fix is None:
        return fmt
    found = fix(fmt)
    if named:
        return found if (found.grid, found.block, found.symmetric) == (fmt.grid, fmt.block, fmt.symmetric) else fmt
    return _change(found, bits, group_size, symmetric)


def _widen(grid: Grid, bits: int) -> Grid:
    """Return the grid of the same family with `bits`."""
    if type(bits) is not int or bits not in range(2, 9):
        raise RecipeError(206, f"bits must be a whole number from 2 to 8, not {bits!r}.")
    if isinstance(grid, IntGrid):
        return narrow_grid(bits) if grid.name.startswith("narrow") else int_grid(bits)
    if grid.name.startswith("nf"):
        return nf_grid(bits)
    if bits != grid.bits:
        raise RecipeError(206, f"{grid.name} has {grid.bits} bits, not {bits}; leave --bits out.")
    return grid


def catalogue() -> list[dict[str, Any]]:
    """Return every bundled recipe with its paper, format and the options of its parts, as plain values."""
    found = []
    for name in names():
        chosen = load(name)
        options = {
            f"{kind}.{f.name}": (str(f.type), getattr(part, f.name))
            for kind, part in chosen.parts()
            for f in fields(part)
        }
        if chosen.inputs is not None:
            options |= {f"inputs.{k}": (kind.__name__, getattr(chosen.inputs, k)) for k, kind in INPUT_OPTIONS.items()}
        found.append(
            {
                "name": name,
                "about": chosen.about,
                "paper": chosen.paper,
                "weights": chosen.weights.short,
                "inputs": None if chosen.inputs is None else str(chosen.inputs),
                "options": options,
            }
        )
    return found
