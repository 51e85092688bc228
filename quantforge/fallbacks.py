"""Numerical failure as data: what became of each layer otherwise than asked, in words, and as an error on demand.

A fallback is one layer's: calibration tokens that could not be used, or too few of them, and a solver that had to do
with more damping, a diagonal, or plain rounding. What a method does by design, such as columns that it keeps in float,
is none, and nor is a factorization in float64, whose result is what was asked for: these stand in the layers' notes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantforge.errors import ModelError, QuantForgeError
from quantforge.models import moe
from quantforge.numerics.formats import E8M0
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor

if TYPE_CHECKING:
    from quantforge.calibrate.stats import Statistics
    from quantforge.plan import LayerPlan, Plan
    from quantforge.solving import Layer


def facts(solved: QWeight, found: Statistics | None) -> dict[str, Any]:
    """Return what a layer's notes have to say of its solve: tokens left out, and scales that its format cannot hold."""
    clipped = sum(map(_at_the_end, _stored(solved.base)))
    return {**({} if found is None else found.facts()), **({"clipped_scales": clipped} if clipped else {})}


def check_solved(name: str, weight: Tensor, approx: Tensor) -> None:
    """Raise ModelError if what came of `weight` is not finite, which its format was too narrow for."""
    if not bool(approx.sum().isfinite()) and not bool(approx.isfinite().all()):
        raise ModelError(
            399,
            f"{name} holds weights up to {float(weight.abs().max()):.3g}, which its format cannot hold: they became "
            "infinite; leave the layer out, or choose a format with scales in fp32.",
        )


def _stored(base: QTensor) -> list[Tensor]:
    """Return the floats that a matrix stores beside its codes, those of quantized scales and zero points as well."""
    found = []
    for part in (base.scale, base.zero if base.format.minimum else None):
        if isinstance(part, QTensor):
            found += _stored(part)
        elif part is not None:
            found.append(part)
    return found


def _at_the_end(stored: Tensor) -> int:
    """Count the numbers that are the largest of their dtype, which is what those beyond it become."""
    if not stored.is_floating_point() or stored.dtype == E8M0:  # a power of two may well be the largest by right
        return 0
    return int((stored.float().abs() >= torch.finfo(stored.dtype).max).sum())


def describe(plan: Plan, layers: Sequence[Layer]) -> list[str]:
    """Return every fallback of the layers of a run, a line each, beginning with the layer's name."""
    total = max(map(_called, layers), default=0)
    return [f"{layer.name}{line}" for layer in layers for line in _of_layer(layer, plan.layers[layer.name], total)]


def refuse(lines: Sequence[str]) -> None:
    """Raise QuantForgeError, which names the first of the fallbacks and their number, if there is any."""
    if lines:
        count = "1 fallback" if len(lines) == 1 else f"{len(lines):,} fallbacks, the first"
        raise QuantForgeError(570, f"strict: {count}: {lines[0]}; nothing was saved, without strict they are notes.")


def remarks(plan: Plan, layers: Sequence[Layer]) -> list[str]:
    """Return what is no fallback but worth knowing: fewer tokens than inputs, or than all, and columns in float."""
    found = []
    wanting = [x for x in layers if plan.layers[x.name].needs and x.tokens and moe.expert_of(x.name) is None]
    ratios = {
        x.name: x.tokens / plan.layers[x.name].shape[1] for x in wanting if "hessian" in plan.layers[x.name].needs
    }
    short = [name for name, ratio in ratios.items() if ratio < 1]
    if short:
        least = min(short, key=ratios.__getitem__)
        found.append(
            f"{len(short):,} of {len(layers):,} layers saw fewer calibration tokens than they have inputs, "
            f"{least} {ratios[least]:.2g} an input: more samples would tell more of them"
        )
    total = max(map(_called, layers), default=0)
    part = [x for x in wanting if _called(x) < total]
    if part:
        found.append(
            f"{len(part):,} of {len(layers):,} layers were not called for every calibration token, {part[0].name} for "
            f"{_called(part[0]):,} of {total:,}"
        )
    spared = [x.weight.notes["float_columns"] for x in layers if x.weight.notes.get("float_columns")]
    if spared:
        found.append(f"{sum(spared):,} input columns of {len(spared):,} layers stay in float, as the method has it")
    return found


def _called(layer: Layer) -> int:
    """Return how many calibration tokens reached a layer, those that were left out too."""
    return layer.tokens + int(layer.weight.notes.get("skipped_tokens", 0))


def _of_layer(layer: Layer, planned: LayerPlan, total: int) -> list[str]:
    """Return the fallbacks of one layer, without its name; `total` counts all calibration tokens."""
    notes, seen = layer.weight.notes, layer.tokens
    skipped, called = notes.get("skipped_tokens", 0), _called(layer)
    first = f"first in {notes.get('first_skipped')}"
    found = []
    if planned.needs and not seen:
        nowhere = f" with a finite input: all {skipped:,} were NaN or infinite, {first},"
        found.append(f" saw no calibration token{nowhere if skipped else ''} and was rounded")
    elif planned.needs and moe.starved(layer.name, seen, planned.shape[1], total):
        found.append(f" saw only {seen:,} of {total:,} calibration tokens and was rounded")
    else:
        found += [f": {reason}" for reason in _of_solver(notes, planned)]
    if skipped and (seen or not planned.needs):
        of = f"{skipped:,} of {called:,}" if seen else f"{skipped:,}"
        found.append(f": the input of {of} tokens was NaN or infinite, {first}: they were left out")
    if notes.get("clipped_scales"):
        found.append(
            f": {notes['clipped_scales']:,} of its scales were beyond the largest of their dtype, and were cut"
        )
    if not math.isfinite(layer.loss):
        found.append(": what it lost is not finite, so its weights or inputs are too large to be judged")
    return found


def _of_solver(notes: dict[str, Any], planned: LayerPlan) -> list[str]:
    """Return what a layer's solver and its corrections could not do as asked."""
    found = []
    asked = getattr(planned.solver, "damp_percent", None)
    if notes.get("rung") == "diagonal" and notes.get("dead_columns") == planned.shape[1]:
        found.append("all its inputs were zero, so only rounding was left")
    elif notes.get("rung") == "diagonal":
        found.append("its Hessian could not be factored, and only its diagonal was used")
    elif asked is not None and "damp" in notes and notes["damp"] != asked:
        found.append(f"damping was raised to {notes['damp']}")
    if notes.get("rounded"):
        found.append("rounding lost less than the method, and was kept")
    if "factors" in notes:
        found.append(f"its low-rank correction is {notes['factors']}")
    return found
