"""What rows a comparison is asked for: recipes by label, caches, and the float model in other dtypes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quantforge import api, recipe
from quantforge.calibrate.text_files import Reading
from quantforge.errors import RecipeError, pick
from quantforge.models.kvcache import KVCache, KVFormat
from quantforge.plan import Plan
from quantforge.recipe import Recipe

FLOAT = "fp"
DTYPES = {f"{FLOAT}-{name}": getattr(torch, name) for name in ("bfloat16", "float16", "float64")}
"""The float model computed in another dtype: what differs then is rounding, and so is any difference below it."""

MOST_SAID = 2  # overrides in the label of a row


@dataclass(frozen=True)
class Request:
    """What a comparison on one model is asked for; the fields are the arguments of `compare`, as plain values."""

    model: str | None
    methods: tuple[str, ...]
    bits: tuple[int, ...]
    group_size: int | None
    symmetric: bool | None
    weights: str | None
    inputs: str | None
    calibration: str
    samples: int
    seq_len: int
    shuffle: bool
    seed: int
    data: str
    windows: int | None
    tasks: tuple[str, ...]
    shots: int | None
    limit: int | None
    task_dirs: tuple[str, ...]
    device: str
    settings: dict[str, Any]
    overrides: dict[str, dict[str, Any]]
    keep: str | None
    reading: Reading
    trust_remote_code: bool
    command: str


def recipes(request: Request) -> dict[str, Recipe]:
    """Return the recipe of every quantized row by label; settings apply to the methods that have them.

    Raises RecipeError for what does not exist or go together.
    """
    methods, settings, overrides = request.methods, request.settings, request.overrides
    if not methods or not request.bits:
        raise RecipeError(208, "there is nothing to compare: name at least one method and one number of bits.")
    found: dict[str, Recipe] = {}
    own_formats = (request.group_size, request.symmetric, request.weights, request.inputs)
    unused = set(settings)
    for name in (m for m in methods if m in recipe.suites()):
        if any(option is not None for option in own_formats) or overrides:
            raise RecipeError(221, f"the suite {name!r} brings its own formats; leave --group-size and the like out.")
        found |= {wish.label: wish.recipe() for wish in recipe.suite(name) if not wish.method.startswith(recipe.CACHE)}
    suited = set(found)
    for width in request.bits if request.weights is None else (None,):  # a notation has its own
        for method in methods:
            if method in (FLOAT, *DTYPES) or method in recipe.suites() or method.startswith(recipe.CACHE):
                continue
            for part in method.split("+"):
                pick("method", part, [FLOAT, *DTYPES, *recipe.names(), *recipe.suites()])
            plain = recipe.load(method, inputs=request.inputs)
            has = {f"{part}.{key}" for part, values in plain.options().items() for key in values}
            has |= {f"inputs.{key}" for key in recipe.INPUT_OPTIONS} if plain.inputs else set()
            usable = {key: value for key, value in settings.items() if key in has}
            unused -= usable.keys()
            chosen = recipe.load(
                method,
                bits=width,
                group_size=request.group_size,
                symmetric=request.symmetric,
                weights=request.weights,
                inputs=request.inputs,
                settings=usable,
                overrides=overrides,
            )
            if chosen.label in suited:
                raise RecipeError(223, f"a suite has a row {chosen.label!r} already; leave {method!r} out.")
            found[" ".join([chosen.label, *_said(overrides)])] = chosen
    if unused:
        raise RecipeError(209, f"none of the methods {', '.join(methods)} has the setting {min(unused)!r}.")
    return found


def _said(overrides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return overrides as they are typed, for the label of a row; of many the first ones, which are then counted."""
    said = [
        f"{pattern}:{','.join(key if value is True else f'{key}={value}' for key, value in wish.items())}"
        for pattern, wish in overrides.items()
    ]
    return said if len(said) <= MOST_SAID else [*said[: MOST_SAID - 1], f"and {len(said) - MOST_SAID + 1} more"]


def caches(methods: Sequence[str], config: Any) -> dict[str, KVFormat]:
    """Return the caches that `methods`, or the suites among them, ask for, by label; they must suit the model."""
    rows = [wish.method for name in methods if name in recipe.suites() for wish in recipe.suite(name)]
    asked = [name for name in (*methods, *rows) if name.startswith(recipe.CACHE)]
    found = {name: api.cache_format(name.removeprefix(recipe.CACHE)) for name in asked}
    for fmt in found.values():
        KVCache(fmt, config)
    return found


def told(plan: Plan) -> dict[str, Any]:
    """Return what a report says of a plan: the format and every option of its parts."""
    chosen = plan.recipe
    found: dict[str, Any] = {"format": str(chosen.weights.with_scale(plan.dtype))}
    if chosen.inputs:
        found["inputs"] = str(chosen.inputs)
    if chosen.overrides:
        found["overrides"] = {
            pattern: "float" if other is None else {"method": other.name, **told(replace(plan, recipe=other))}
            for pattern, other in chosen.overrides
        }
    if len(chosen.overrides) > 1:  # the last match wins, and dictionaries are equal in any order
        found["override order"] = [pattern for pattern, _ in chosen.overrides]
    return found | _options(chosen)


def _options(chosen: Recipe) -> dict[str, Any]:
    """Return the options of a recipe's parts; those of the solver by their bare names."""
    found = chosen.options()
    rest = {
        f"{part}.{key}": value for part, values in found.items() if part != "solver" for key, value in values.items()
    }
    return {**found["solver"], **rest}
