"""Scales chosen for the float model's layers before any is solved, and folded into what comes before them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.calibrate.stats import Statistics, positions
from quantforge.course import Course, Run, by_block, number
from quantforge.models import arch, fold
from quantforge.models.walk import Call, Stage
from quantforge.numerics.problem import Problem
from quantforge.numerics.products import linear
from quantforge.plan import Plan
from quantforge.protocols import Transform
from quantforge.resume import Chosen, Place

Facts = dict[str, dict[str, Any]]  # notes of layers, by name


def rescale(run: Run, phase: int, plan: Plan, transform: Transform, batches: Sequence[Tensor]) -> Facts:
    """Choose scales for every group of layers that allows it, from one walk of the float model; then apply them all.

    phase  which of the plan's transforms it is: what a run that was broken off has chosen is not chosen again

    Returns, by layer, which tokens were left out, and what the widest channel of its input was and became, where
    extremes were collected. They are known as soon as the layer's block is in memory.
    """
    model = run.blocks.model
    folds = [f for f in fold.find(model) if any(name in plan.layers for name in f.consumers)]
    folds = [f for f in folds if f.producer.kind.split()[0] in transform.producers]
    if run.record.place.phase <= phase:
        _choose(run, phase, plan, transform, batches, folds)
    facts: Facts = {}
    groups = [(folds[chosen.group], chosen) for chosen in run.record.chosen.get(phase, [])]
    path = run.blocks.path
    inside: dict[int, list[tuple[fold.Fold, Chosen]]] = {}
    for group, chosen in groups:
        inside.setdefault(number(run.blocks, Stage((group.observed,), ())), []).append((group, chosen))
    assert all(group.producer.name.startswith(f"{path}.") for group, _ in groups)
    run.blocks.prepare(partial(_apply, inside, plan, facts))
    return facts


def _choose(
    run: Run, phase: int, plan: Plan, transform: Transform, batches: Sequence[Tensor], folds: Sequence[fold.Fold]
) -> None:
    """Walk through the float model and let the transform choose scales for `folds`, block by block."""
    model, record = run.blocks.model, run.record
    groups = {f.observed: i for i, f in enumerate(folds)}
    known = {chosen.group for chosen in record.chosen.get(phase, [])}
    stages = [Stage((f.observed,), (model.get_submodule(f.observed),)) for i, f in enumerate(folds) if i not in known]
    place = record.place
    course = Course(run, batches, by_block(run.blocks, stages, place.at), place.hidden, place.outputs)
    gathered: dict[int, Statistics] = {}

    def observe(index: int, batch: int, x: Tensor | Call) -> None:
        if not isinstance(x, Tensor):
            return
        if index not in gathered:
            gathered[index] = Statistics(frozenset(transform.needs), x.shape[-1], x.device)
        gathered[index].add(batch, x, where=positions(batches, batch, x.shape[:-1].numel()))

    for index in course.walk(observe):
        if course.stages[index].block:
            if course.hidden is not None:
                record.place = Place(phase, course.at, course.outputs, course.hidden)
                if run.again or record.due():
                    record.commit()
        elif index in gathered:
            group = groups[course.stages[index].names[0]]
            record.choose(phase, _scales(model, plan, transform, folds[group], gathered.pop(index), group))
        run.check_stop()
    record.place = Place(phase + 1)
    if record.due():
        record.commit()


def _scales(
    model: nn.Module, plan: Plan, transform: Transform, group: fold.Fold, found: Statistics, index: int
) -> Chosen:
    """Let the transform choose the scales of one group of layers."""
    names = [name for name in group.consumers if name in plan.layers]
    fields = found.fields()
    weights = [arch.get_weight(model.get_submodule(name)) for name in names]
    if "hessian" in transform.needs:
        weights = [_balanced(w, fields["hessian"]) for w in weights]
    weight = torch.cat(weights)
    fmt = min((plan.layers[name].format for name in names), key=lambda f: f.grid.bits)  # they share the scales
    problem = Problem(" + ".join(names), weight, fmt, inputs=plan.layers[names[0]].inputs, **fields)
    low, high = problem.extremes or (None, None)
    widths = None if low is None or high is None else torch.maximum(low.abs(), high.abs())
    return Chosen(index, transform.scales(problem, group.tie), widths, found.facts())


def _apply(
    inside: dict[int, list[tuple[fold.Fold, Chosen]]], plan: Plan, facts: Facts, model: nn.Module, index: int
) -> None:
    """Apply what was chosen to block `index` of `model`; add to `facts`."""
    groups = inside.get(index, [])
    for group, chosen in groups:
        applied = group.apply(model, chosen.scales, plan.dtype)
        notes = dict(chosen.notes)
        if chosen.widths is not None:
            notes["widest_input"] = float(chosen.widths.max())
            notes["smoothed_to"] = float((chosen.widths / applied).max())
        facts |= dict.fromkeys(group.consumers, notes)
    touched = {name for group, _ in groups for name in (*group.consumers, *group.extra, group.producer.name)}
    for name in touched - set(plan.layers):  # what stays in float is computed with as it will be saved
        module = model.get_submodule(name)
        arch.set_weight(module, arch.get_weight(module).to(plan.dtype))


def _balanced(weight: Tensor, hessian: Tensor) -> Tensor:
    """Scale `weight` by a power of two to an output energy of about 1, so that every consumer's error counts alike."""
    energy = float((linear(weight, hessian) * weight).double().sum())
    return weight * 2.0 ** -round(math.log2(energy) / 2) if 0 < energy < math.inf else weight
