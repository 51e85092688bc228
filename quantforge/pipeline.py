"""The straight line: rescale the float model, walk through it once, solve each layer on the way and put it in place."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.calibrate.stats import Statistics
from quantforge.models import arch, fold, moe
from quantforge.models.walk import Stage, walk
from quantforge.numerics.problem import Problem, QWeight
from quantforge.plan import LayerPlan, Plan
from quantforge.protocols import Transform

BATCH_TOKENS = 2048
HELD = 8  # one batch in so many is held out where a fit to the others is to be judged


@dataclass(frozen=True)
class Layer:
    """What became of one layer.

    weight         the codes, and what is kept beside them
    loss           tr((W − Ŵ) H (W − Ŵ)ᵀ), or Σ (W − Ŵ)² where no data was used
    relative_loss  loss divided by tr(W H Wᵀ), or by Σ W²: the share of the layer's output that is error
    tokens         calibration tokens that the layer saw
    seconds        spent solving, shared evenly by layers solved together
    """

    name: str
    weight: QWeight
    loss: float
    relative_loss: float
    tokens: int
    seconds: float


Progress = Callable[[Layer], None]


def quantize(
    model: nn.Module, plan: Plan, ids: Tensor | None = None, progress: Progress = lambda layer: None
) -> list[Layer]:
    """Quantize `model` in place by `plan`, and return a row a layer in the order of the forward.

    The model's weights become the dequantized values of the codes.

    ids       token ids [windows, seq_len] to calibrate on; None for plans that need no data, whose losses are then
              those of the weights; with ids, those of the outputs
    progress  called with each layer as it is done
    """
    stages = plan.select(arch.find_stages(model)[0])
    layers: list[Layer] = []
    if ids is None:
        assert not plan.needs, "the plan needs data"
        for stage in stages:
            layers += _solve(stage, plan, None, progress)
        return layers
    device = next(model.parameters()).device
    batches = [b.to(device) for b in torch.split(ids, max(BATCH_TOKENS // ids.shape[1], 1))]
    for transform in plan.recipe.transforms:
        _rescale(model, plan, transform, batches)
    held = frozenset(range(HELD - 1, len(batches), HELD)) or frozenset({len(batches) - 1})
    gathered: dict[int, Statistics] = {}
    float_inputs: dict[tuple[int, int], Tensor] = {}
    ahead = _float_walk(model, plan, batches, float_inputs) if "drift" in plan.needs else None

    def observe(index: int, batch: int, x: Tensor) -> None:
        if index not in gathered:
            gathered[index] = Statistics(plan.needs, x.shape[-1], x.device, held)
        gathered[index].add(batch, x, float_inputs.pop((index, batch), None))

    if ahead is not None:
        next(ahead, None)
    for index in walk(_body(model), batches, stages, observe):
        layers += _solve(stages[index], plan, gathered.pop(index, None), progress)
        if ahead is not None:
            next(ahead, None)
    return layers


def _body(model: nn.Module) -> Callable[[Tensor], object]:
    """Return the forward without the output head, which no layer behind it needs."""
    body = getattr(model, "base_model", model)
    return lambda batch: body(input_ids=batch, use_cache=False)


def _float_walk(
    model: nn.Module, plan: Plan, batches: list[Tensor], inputs: dict[tuple[int, int], Tensor]
) -> Iterator[int]:
    """Walk a copy of the float model, one stage ahead, and leave what each stage gets in `inputs`.

    Experts are left out: the float model's router may send them other tokens, which cannot be compared.
    """
    twin = copy.deepcopy(model)
    stages = plan.select(arch.find_stages(twin)[0])

    def keep(index: int, batch: int, x: Tensor) -> None:
        if moe.expert_of(stages[index].names[0]) is None:
            inputs[index, batch] = x.detach()

    return walk(_body(twin), batches, stages, keep)


def _rescale(model: nn.Module, plan: Plan, transform: Transform, batches: list[Tensor]) -> None:
    """Choose scales for every group of layers that allows it, from one walk of the float model; then apply them all."""
    folds = [f for f in fold.find(model) if any(name in plan.layers for name in f.consumers)]
    stages = [Stage((f.observed,), (model.get_submodule(f.observed),)) for f in folds]
    gathered: dict[int, Statistics] = {}

    def observe(index: int, batch: int, x: Tensor) -> None:
        if index not in gathered:
            gathered[index] = Statistics(frozenset(transform.needs), x.shape[-1], x.device)
        gathered[index].add(batch, x)

    chosen = []
    for index in walk(_body(model), batches, stages, observe):
        if index in gathered:
            names = [name for name in folds[index].consumers if name in plan.layers]
            weight = torch.cat([arch.get_weight(model.get_submodule(name)) for name in names])
            fmt = plan.layers[names[0]].format
            problem = Problem(" + ".join(names), weight, fmt, **gathered.pop(index).fields())
            chosen.append((folds[index], transform.scales(problem, folds[index].tie)))
    for group, scales in chosen:
        group.apply(model, scales, plan.dtype)
    touched = {name for group, _ in chosen for name in (*group.consumers, *group.extra, group.producer.name)}
    for name in touched - set(plan.layers):  # what stays in float is computed with as it will be saved
        module = model.get_submodule(name)
        arch.set_weight(module, arch.get_weight(module).to(plan.dtype))


def _solve(stage: Stage, plan: Plan, found: Statistics | None, progress: Progress) -> list[Layer]:
    """Solve one stage's layers, stacked along the rows where their format allows, and install the results."""
    start = time.perf_counter()
    modules = dict(zip(stage.names, stage.modules, strict=True))
    fields: dict[str, Any] = {}
    if found is not None:
        fields = found.fields()
    elif plan.needs:  # no batch came here: zeros say that nothing is known, and the solver rounds
        width = plan.layers[stage.names[0]].shape[1]
        device = arch.get_weight(stage.modules[0]).device
        fields = Statistics(plan.needs, width, device).fields()
    done = []
    for group in _stacks([plan.layers[name] for name in stage.names]):
        weights = [arch.get_weight(modules[p.name]) for p in group]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        problem = Problem(" + ".join(p.name for p in group), stacked, group[0].format, **fields)
        solved = group[0].solver.solve(problem)
        for correction in group[0].corrections:
            solved = correction.correct(problem, solved)
        approx = solved.dequantize()
        errors, energies = problem.row_losses(approx), problem.row_losses(torch.zeros_like(approx))
        top = 0
        for p in group:
            rows = slice(top, top + p.shape[0])
            top = rows.stop
            loss, energy = (float(v[rows].double().sum()) for v in (errors, energies))
            weight = solved.rows(rows.start, rows.stop) if len(group) > 1 else solved
            done.append((p.name, weight, loss, loss / energy if energy > 0 else 0.0))
            arch.set_weight(modules[p.name], approx[rows])
    each = (time.perf_counter() - start) / len(done)
    seen = 0 if found is None else found.tokens
    layers = [Layer(name, weight, loss, relative, seen, each) for name, weight, loss, relative in done]
    for layer in layers:
        progress(layer)
    return layers


def _stacks(layers: list[LayerPlan]) -> list[list[LayerPlan]]:
    """Group a stage's layers that can be solved as one matrix: treated alike, and nothing stored across their border.

    What is found for all rows together, such as a low-rank correction, is found for each layer alone.
    """
    stacks: list[list[LayerPlan]] = []
    for p in layers:
        unit = p.format.row_unit
        if stacks and unit and not p.corrections and stacks[-1][-1].shape[0] % unit == 0:
            last = stacks[-1][-1]
            if (p.format, p.solver, p.corrections) == (last.format, last.solver, last.corrections):
                stacks[-1].append(p)
                continue
        stacks.append([p])
    return stacks
