"""The straight line: walk through the model once, solve every layer on the way, put the result in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantforge.calibrate.stats import Hessian
from quantforge.models import arch
from quantforge.models.walk import Stage, walk
from quantforge.numerics.problem import Problem, QWeight
from quantforge.plan import Plan

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Layer:
    """What became of one layer.

    weight         the codes
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

    ids       token ids [windows, seq_len] to calibrate on; None for solvers that need no data, whose losses are then
              those of the weights; with ids, those of the outputs
    progress  called with each layer as it is done
    """
    stages = plan.select(arch.find_stages(model)[0])
    layers: list[Layer] = []
    if ids is None:
        assert not plan.recipe.solver.needs, "the plan's solver needs data"
        for stage in stages:
            layers += _solve(stage, plan, None, progress)
        return layers
    device = next(model.parameters()).device
    batches = [b.to(device) for b in torch.split(ids, max(BATCH_TOKENS // ids.shape[1], 1))]
    hessians: dict[int, Hessian] = {}

    def observe(index: int, batch: int, x: Tensor) -> None:
        if index not in hessians:
            hessians[index] = Hessian(x.shape[-1], x.device)
        hessians[index].add(x)

    for index in walk(_body(model), batches, stages, observe):
        layers += _solve(stages[index], plan, hessians.pop(index, None), progress)
    return layers


def _body(model: nn.Module) -> Callable[[Tensor], object]:
    """Return the forward without the output head, which no layer behind it needs."""
    body = getattr(model, "base_model", model)
    return lambda batch: body(input_ids=batch, use_cache=False)


def _solve(stage: Stage, plan: Plan, hessian: Hessian | None, progress: Progress) -> list[Layer]:
    """Solve one stage's layers, stacked along the rows where their format allows, and install the results."""
    start = time.perf_counter()
    h, seen = None, 0
    if hessian is not None:
        h, seen = hessian.value(), hessian.tokens
    elif plan.recipe.solver.needs:  # no batch came here: zeros say that nothing is known, and the solver rounds
        width = plan.layers[stage.names[0]].shape[1]
        h = torch.zeros(width, width, device=arch.get_weight(stage.modules[0]).device)
    done = []
    for group in _stacks(stage, plan):
        weights = [arch.get_weight(stage.modules[stage.names.index(name)]) for name in group]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        problem = Problem(" + ".join(group), stacked, plan.layers[group[0]].format, h)
        solved = plan.recipe.solver.solve(problem)
        approx = solved.dequantize()
        errors, energies = problem.row_losses(approx), problem.row_losses(torch.zeros_like(approx))
        top = 0
        for name, weight in zip(group, weights, strict=True):
            rows = slice(top, top + weight.shape[0])
            top = rows.stop
            base = solved.base.rows(rows.start, rows.stop) if len(group) > 1 else solved.base
            loss, energy = (float(v[rows].double().sum()) for v in (errors, energies))
            relative = loss / energy if energy > 0 else 0.0
            done.append((name, QWeight(base, solved.notes), loss, relative))
            arch.set_weight(stage.modules[stage.names.index(name)], approx[rows])
    each = (time.perf_counter() - start) / len(done)
    layers = [Layer(name, weight, loss, relative, seen, each) for name, weight, loss, relative in done]
    for layer in layers:
        progress(layer)
    return layers


def _stacks(stage: Stage, plan: Plan) -> list[list[str]]:
    """Group a stage's layers that can be solved as one matrix: same format, no scale shared between rows."""
    stacks: list[list[str]] = []
    for name in stage.names:
        fmt = plan.layers[name].format
        if stacks and fmt.block[0] == 1 and plan.layers[stacks[-1][0]].format == fmt:
            stacks[-1].append(name)
        else:
            stacks.append([name])
    return stacks
