"""Exporters: how a quantized model is written, and the choice between them."""

from __future__ import annotations

from quantforge import registry
from quantforge.errors import PlanError, pick
from quantforge.plan import Plan
from quantforge.protocols import Exporter

# what loads elsewhere comes first; the last takes everything
PREFERRED = ("compressed-tensors", "bitsandbytes", "bitsandbytes8", "native")
_PART = "bitsandbytes8"  # which "bitsandbytes" stands for too


def names() -> list[str]:
    """Return the names of all containers that a user may ask for, sorted."""
    return [name for name in registry.names("exporter") if name != _PART]


def named(name: str) -> Exporter:
    """Return the exporter that a user calls `name`; RecipeError with the nearest name if there is none."""
    found: Exporter = registry.create("exporter", pick("format", name, names()))
    return found


def check(plan: Plan, exporter: Exporter) -> None:
    """Raise PlanError if `exporter` cannot hold what `plan` makes; where the user named it, say which can."""
    reason = exporter.refuses(plan)
    if reason:
        able = [n for n in PREFERRED if plan.container and n in registry.names("exporter") and _holds(n, plan)]
        hint = f" --format {able[0].replace(_PART, 'bitsandbytes')} holds it." if able else ""
        raise PlanError(253, reason + hint)


def _holds(name: str, plan: Plan) -> bool:
    exporter: Exporter = registry.create("exporter", name)
    return exporter.takes(plan) and not exporter.refuses(plan)


def choose(plan: Plan, name: str | None = None) -> Exporter:
    """Return the exporter called `name`, or of the container that `plan` was made for, or the first that takes it."""
    asked = name or plan.container
    if asked == "bitsandbytes" and any(p.inputs for p in plan.layers.values()):
        asked = _PART
    if asked:
        chosen: Exporter = registry.create("exporter", asked)
        return chosen
    known = [n for n in PREFERRED if n in registry.names("exporter")]
    exporters: list[Exporter] = [registry.create("exporter", n) for n in known]
    return next(e for e in exporters if e.takes(plan))
