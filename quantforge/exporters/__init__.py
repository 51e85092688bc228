"""Exporters: how a quantized model is written, and the choice between them."""

from __future__ import annotations

from quantforge import registry
from quantforge.plan import Plan
from quantforge.protocols import Exporter

# what loads elsewhere comes first; the last takes everything
PREFERRED = ("compressed-tensors", "bitsandbytes", "bitsandbytes8", "native")


def choose(plan: Plan, name: str | None = None) -> Exporter:
    """Return the exporter called `name`, or the first whose formats are those of `plan`."""
    if name is not None:
        chosen: Exporter = registry.create("exporter", name)
        return chosen
    known = [n for n in PREFERRED if n in registry.names("exporter")]
    exporters: list[Exporter] = [registry.create("exporter", n) for n in known]
    return next(e for e in exporters if e.takes(plan))
