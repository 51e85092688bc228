"""The straight line: rescale the float model, walk through it once, solve each layer on the way and put it in place."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.calibrate.stats import Statistics
from quantforge.models import arch, fold, moe
from quantforge.models.walk import Call, Stage, walk
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.ranges import Range
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
    layers: list[Layer] = []
    if ids is None:
        assert not plan.needs, "the plan needs data"
        for stage in _stages(model, plan):
            layers += _solve(stage, plan, None, progress)
        return layers
    device = next(model.parameters()).device
    size = max(BATCH_TOKENS // ids.shape[1], 1)
    if "drift" in plan.needs:  # some batches must be left to judge by
        size = min(size, max(len(ids) // HELD, 1))
    batches = [b.to(device) for b in torch.split(ids, size)]
    for transform in plan.recipe.transforms:
        _rescale(model, plan, transform, batches)
    stages = _stages(model, plan)
    found = _Gathered(plan, len(batches))
    ahead = _float_walk(model, plan, batches, found) if "drift" in plan.needs else repeat(0)
    next(ahead, None)
    ranges: dict[str, Range] = {}
    for index in walk(_body(model), batches, stages, found.observe):
        if stages[index].block:
            ranges |= _tune(stages[index], plan, found.calls.pop(index, []))
        else:
            statistics = found.statistics.pop(index, None)
            layers += _solve(stages[index], plan, statistics, progress, ranges, ids.numel())
        next(ahead, None)
    return layers


def float_losses(model: nn.Module, plans: Mapping[str, Plan], ids: Tensor) -> dict[str, dict[str, tuple[float, float]]]:
    """Return what the rounding of plans that need no data does to outputs: (loss, relative loss) on float inputs.

    By the names of the plans and of the layers, from one walk of the float `model`, which stays as it is.
    """
    device = next(model.parameters()).device
    batches = [b.to(device) for b in torch.split(ids, max(BATCH_TOKENS // ids.shape[1], 1))]
    stages = arch.find_stages(model)[0]
    gathered: dict[int, Statistics] = {}

    def observe(index: int, batch: int, x: Tensor) -> None:
        if index not in gathered:
            gathered[index] = Statistics(frozenset({"hessian"}), x.shape[-1], x.device)
        gathered[index].add(batch, x)

    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in plans}
    for index in walk(_body(model), batches, stages, observe):
        statistics = gathered.pop(index, None)
        for name, plan in plans.items():
            for stage in plan.select([stages[index]]):
                layers = _solve(stage, plan, statistics, lambda layer: None, install=False)
                found[name] |= {layer.name: (layer.loss, layer.relative_loss) for layer in layers}
    return found


class _Gathered:
    """What a walk has collected for the stages that wait to be solved."""

    def __init__(self, plan: Plan, batches: int) -> None:
        self.needs = plan.needs
        self.held = frozenset(range(HELD - 1, batches, HELD)) or frozenset(range(1, batches)[-1:])
        self.statistics: dict[int, Statistics] = {}
        self.calls: dict[int, list[Call]] = {}
        self.float_inputs: dict[tuple[int, int], Tensor] = {}

    def observe(self, index: int, batch: int, x: Tensor | Call) -> None:
        """Add the input of a stage, or keep the call of a block."""
        if not isinstance(x, Tensor):
            self.calls.setdefault(index, []).append(x)
            return
        if index not in self.statistics:
            self.statistics[index] = Statistics(self.needs, x.shape[-1], x.device, self.held)
        self.statistics[index].add(batch, x, self.float_inputs.pop((index, batch), None))


def _stages(model: nn.Module, plan: Plan) -> list[Stage]:
    """Return the stages that `plan` solves; if it has tuners, each block is a stage too, before its own."""
    stages = plan.select(arch.find_stages(model)[0])
    if not plan.recipe.tuners:
        return stages
    found: list[Stage] = []
    blocks: set[str] = set()
    for stage in stages:
        path = arch.block_path(stage.names[0])
        if path is not None and path not in blocks:
            blocks.add(path)
            found.append(Stage((path,), (model.get_submodule(path),), block=True))
        found.append(stage)
    return found


def _body(model: nn.Module) -> Callable[[Tensor], object]:
    """Return the forward without the output head, which no layer behind it needs."""
    body = getattr(model, "base_model", model)
    return lambda batch: body(input_ids=batch, use_cache=False)


def _float_walk(model: nn.Module, plan: Plan, batches: list[Tensor], found: _Gathered) -> Iterator[int]:
    """Walk a copy of the float model, one stage ahead, and leave what each stage gets in `found`.

    Experts are left out: the float model's router may send them other tokens, which cannot be compared.
    """
    twin = copy.deepcopy(model)
    stages = _stages(twin, plan)

    def keep(index: int, batch: int, x: Tensor | Call) -> None:
        if isinstance(x, Tensor) and moe.expert_of(stages[index].names[0]) is None:
            found.float_inputs[index, batch] = x.detach()

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
            fields = gathered.pop(index).fields()
            weights = [arch.get_weight(model.get_submodule(name)) for name in names]
            weight = torch.cat([_balanced(w, fields["hessian"]) for w in weights])
            fmt = min((plan.layers[name].format for name in names), key=lambda f: f.grid.bits)  # they share the scales
            problem = Problem(" + ".join(names), weight, fmt, **fields)
            chosen.append((folds[index], transform.scales(problem, folds[index].tie)))
    for group, scales in chosen:
        group.apply(model, scales, plan.dtype)
    touched = {name for group, _ in chosen for name in (*group.consumers, *group.extra, group.producer.name)}
    for name in touched - set(plan.layers):  # what stays in float is computed with as it will be saved
        module = model.get_submodule(name)
        arch.set_weight(module, arch.get_weight(module).to(plan.dtype))


def _balanced(weight: Tensor, hessian: Tensor) -> Tensor:
    """Scale `weight` by a power of two to an output energy of about 1, so that every consumer's error counts alike."""
    energy = float(((weight @ hessian) * weight).double().sum())
    return weight * 2.0 ** -round(math.log2(energy) / 2) if energy > 0 else weight


def _tune(stage: Stage, plan: Plan, calls: list[Call]) -> dict[str, Range]:
    """Run the plan's tuners on one block; return the ranges of its layers by full name."""
    (path,), (block,) = stage.names, stage.modules
    formats = {
        name.removeprefix(f"{path}."): p.format for name, p in plan.layers.items() if name.startswith(f"{path}.")
    }
    ranges: dict[str, Range] = {}
    for tuner in plan.recipe.tuners if calls else ():
        ranges |= {f"{path}.{name}": r for name, r in tuner.tune(block, formats, calls).items()}
    return ranges


def _joined(found: list[Range | None]) -> Range | None:
    """Return the ranges of layers that are stacked along the rows as one; None where they are left to the solver."""
    known = [r for r in found if r is not None]
    if len(known) < len(found):
        return None
    return Range(torch.cat([r.scale for r in known]), torch.cat([r.zero for r in known]))


def _solve(
    stage: Stage,
    plan: Plan,
    found: Statistics | None,
    progress: Progress,
    ranges: Mapping[str, Range] = MappingProxyType({}),
    total: int = 0,
    *,
    install: bool = True,
) -> list[Layer]:
    """Solve one stage's layers, stacked along the rows where their format allows, and install the results.

    An expert that saw few of all `total` tokens is rounded: what it saw says too little of what it will see.
    """
    start = time.perf_counter()
    modules = dict(zip(stage.names, stage.modules, strict=True))
    fields: dict[str, Any] = {}
    seen = 0 if found is None else found.tokens
    few = bool(plan.needs) and moe.starved(stage.names[0], seen, plan.layers[stage.names[0]].shape[1], total)
    if found is not None:
        fields = found.fields()
    elif plan.needs:  # no batch came here: zeros say that nothing is known, and the solver rounds
        fields = _nothing(plan, arch.get_weight(stage.modules[0]))
    done = []
    for group in _stacks([plan.layers[name] for name in stage.names]):
        weights = [arch.get_weight(modules[p.name]) for p in group]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        trained = _joined([ranges.get(p.name) for p in group])
        problem = Problem(" + ".join(p.name for p in group), stacked, group[0].format, range=trained, **fields)
        blank = (
            Problem(problem.name, stacked, group[0].format, range=trained, **_nothing(plan, stacked))
            if few
            else problem
        )
        solved = group[0].solver.solve(blank)
        for correction in group[0].corrections:
            solved = correction.correct(blank, solved)
        approx = solved.dequantize()
        own = next(modules[group[0].name].parameters()).dtype
        # a sum of parts is rounded as loaders round it
        installed = solved.dequantize(own) if solved.residuals and own != approx.dtype else approx
        errors, energies = problem.row_losses(approx), problem.row_losses(torch.zeros_like(approx))
        top = 0
        for p in group:
            rows = slice(top, top + p.shape[0])
            top = rows.stop
            loss, energy = (float(v[rows].double().sum()) for v in (errors, energies))
            weight = _part(solved, rows, [p.name for p in group])
            done.append((p.name, weight, loss, loss / energy if energy > 0 else 0.0))
            if install:
                arch.set_weight(modules[p.name], installed[rows])
    each = (time.perf_counter() - start) / len(done)
    layers = [Layer(name, weight, loss, relative, seen, each) for name, weight, loss, relative in done]
    for layer in layers:
        progress(layer)
    return layers


def _nothing(plan: Plan, weight: Tensor) -> dict[str, Any]:
    """Return the statistics of a layer that saw no token, by the fields of a Problem."""
    return Statistics(plan.needs, weight.shape[1], weight.device).fields()


def _part(solved: QWeight, rows: slice, names: list[str]) -> QWeight:
    """Return one layer's rows of what was solved for several; what was counted over all of them says so."""
    if len(names) == 1:
        return solved
    part, together = solved.rows(rows.start, rows.stop), "+".join(name.rpartition(".")[2] for name in names)
    notes = {f"{k} of {together}" if k == "rows_rounded" else k: v for k, v in part.notes.items()}
    return replace(part, notes=notes)


def _stacks(layers: list[LayerPlan]) -> list[list[LayerPlan]]:
    """Group a stage's layers that can be solved as one matrix: treated alike, and nothing found or stored across their
    border.

    What is found for all rows together, a low-rank correction or SpQR's threshold, is found for each layer alone.
    """
    stacks: list[list[LayerPlan]] = []
    for p in layers:
        unit = p.format.row_unit
        if stacks and unit and p.solver.by_row and not p.corrections and stacks[-1][-1].shape[0] % unit == 0:
            last = stacks[-1][-1]
            if (p.format, p.solver, p.corrections) == (last.format, last.solver, last.corrections):
                stacks[-1].append(p)
                continue
        stacks.append([p])
    return stacks
