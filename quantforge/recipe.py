"""Recipes: a named method with its format and options, from a bundled YAML file and the user's changes to it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

import yaml

from quantforge import registry
from quantforge.errors import RecipeError, nearest, pick
from quantforge.numerics.formats import Format, parse
from quantforge.numerics.grids import int_grid
from quantforge.protocols import Solver

_FIELDS = ("about", "paper", "weights", "solver", "skip")


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    name     the method's name
    about    a sentence
    paper    authors, venue, arXiv number
    weights  how linear layers are stored; the dtype of scales is set to the checkpoint's when the plan is made
    solver   how codes are chosen
    skip     names of layers that stay as they are, full or by their last part
    """

    name: str
    about: str
    paper: str
    weights: Format
    solver: Solver
    skip: tuple[str, ...] = ("lm_head",)


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
    settings: dict[str, Any] | None = None,
) -> Recipe:
    """Return the bundled recipe `name`, changed as asked.

    bits        2 to 8; None keeps the recipe's
    group_size  weights along the input that share a scale; -1 is a whole row (per channel)
    symmetric   True: no zero points
    settings    {"solver.damp_percent": 0.01, …}: options of the recipe's parts

    Raises RecipeError for an unknown recipe, option or value, with the nearest name.
    """
    pick("method", name, names())
    text = (resources.files("quantforge") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    assert set(raw) <= set(_FIELDS), f"bundled recipe {name} has unknown fields"
    solver, options = _solver(raw["solver"], settings or {})
    fmt = _change(parse(raw["weights"]), bits, group_size, symmetric)
    built = registry.create("solver", solver, options)
    return Recipe(name, raw["about"], raw["paper"], fmt, built, tuple(raw.get("skip", ())))


def _solver(slot: str | dict[str, dict[str, Any]], settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name, options = (slot, {}) if isinstance(slot, str) else next(iter(slot.items()))
    options = dict(options)
    for key, value in settings.items():
        part, _, option = key.partition(".")
        if part != "solver" or not option:
            known = [f"solver.{o}" for o in registry.options("solver", name)]
            hint = nearest(key, known)
            raise RecipeError(205, f"there is no setting {key!r}: {hint}there are: {', '.join(known)}.")
        options[option] = value
    return name, options


def _change(fmt: Format, bits: int | None, group_size: int | None, symmetric: bool | None) -> Format:
    if bits is not None:
        if type(bits) is not int or bits not in range(2, 9):
            raise RecipeError(206, f"bits must be a whole number from 2 to 8, not {bits!r}.")
        fmt = replace(fmt, grid=int_grid(bits))
    if group_size is not None:
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise RecipeError(207, f"group size must be at least 1, or -1 for a whole row, not {group_size!r}.")
        fmt = replace(fmt, block=(1, None if group_size == -1 else group_size))
    return fmt if symmetric is None else replace(fmt, symmetric=symmetric)


def catalogue() -> list[dict[str, Any]]:
    """Return every bundled recipe with its paper, format and the options of its solver, as plain values."""
    found = []
    for name in names():
        chosen = load(name)
        found.append(
            {
                "name": name,
                "about": chosen.about,
                "paper": chosen.paper,
                "weights": str(chosen.weights).rsplit("-", 1)[0],
                "options": {f.name: (str(f.type), getattr(chosen.solver, f.name)) for f in fields(chosen.solver)},  # type: ignore[arg-type]
            }
        )
    return found
