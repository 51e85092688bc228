"""The straight line: rescale the float model, walk through it once, solve each layer on the way and put it in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn

from quantforge.calibrate.stats import Statistics
from quantforge.errors import PlanError
from quantforge.models import activations, arch, fold, moe
from quantforge.models.walk import Call, Stage, walk
from quantforge.numerics.inputs import Scheme
from quantforge.numerics.problem import Problem
from quantforge.numerics.products import linear
from quantforge.numerics.ranges import Range
from quantforge.plan import Plan
from quantforge.protocols import Transform
from quantforge.solving import Layer, Progress, solve

BATCH_TOKENS = 2048
HELD = 8  # one batch in so many is held out where a fit to the others is to be judged


def quantize(
    model: nn.Module,
    plan: Plan,
    ids: Tensor | None = None,
    progress: Progress = lambda layer: None,
    collect: frozenset[str] = frozenset(),
) -> list[Layer]:
    """Quantize `model` in place by `plan`, and return a row a layer in the order of the forward.

    The model's weights become the dequantized values of the codes, and layers that are to round their inputs do so.

    ids       token ids [windows, seq_len] to calibrate on; None for plans that need no data. Losses are those of the
              outputs where Hessians are collected, else those of the weights
    progress  called with each layer as it is done
    collect   statistics that are wanted besides what the plan needs
    """
    try:
        return _quantize(model, plan, ids, progress, collect)
    except BaseException:
        activations.remove(model.modules())
        raise


def _quantize(
    model: nn.Module, plan: Plan, ids: Tensor | None, progress: Progress, collect: frozenset[str]
) -> list[Layer]:
    activations.remove(model.modules())
    for name, p in plan.layers.items():
        if p.inputs is not None:
            activations.gate(model.get_submodule(name))
    if ids is None:
        if plan.needs:
            raise PlanError(
                275, f"{plan.recipe.label} needs calibration tokens, for {', '.join(sorted(plan.needs))}; pass ids."
            )
        return _solve_all(model, plan, progress)
    device = next(model.parameters()).device
    size = max(BATCH_TOKENS // ids.shape[1], 1)
    if "drift" in plan.needs:  # some batches must be left to judge by
        size = min(size, max(len(ids) // HELD, 1))
    batches = [b.to(device) for b in torch.split(ids, size)]
    facts: dict[str, dict[str, float]] = {}
    for transform in plan.recipe.transforms:
        facts |= _rescale(model, plan, transform, batches)
    collected = _collected(plan) | collect
    if not collected:
        return [_told(layer, facts.get(layer.name, {})) for layer in _solve_all(model, plan, progress)]
    stages = _stages(model, plan)
    found = _Gathered(collected, len(batches))
    ahead = _float_walk(model, plan, batches, found) if plan.needs & {"drift", "float_blocks"} else repeat(0)
    next(ahead, None)
    layers: list[Layer] = []
    ranges: dict[str, Range] = {}
    for index in walk(_body(model), batches, stages, found.observe):
        if stages[index].block:
            ranges |= _tune(stages[index], plan, found.calls.pop(index, []), found.float_calls.pop(index, []))
        else:
            statistics = found.statistics.pop(index, None)
            layers += solve(stages[index], plan, statistics, progress, ranges, ids.numel())
        next(ahead, None)
    return [_told(layer, facts.get(layer.name, {})) for layer in layers]


def _solve_all(model: nn.Module, plan: Plan, progress: Progress) -> list[Layer]:
    """Solve layers that are to be solved by their weights alone."""
    return [layer for stage in _stages(model, plan) for layer in solve(stage, plan, None, progress)]


def _told(layer: Layer, facts: dict[str, float]) -> Layer:
    """Return `layer` with more facts in its notes."""
    return replace(layer, weight=replace(layer.weight, notes={**layer.weight.notes, **facts}))


def float_losses(model: nn.Module, plans: Mapping[str, Plan], ids: Tensor) -> dict[str, dict[str, tuple[float, float]]]:
    """Return what plans that need no Hessian do to the layers' outputs: (loss, relative loss) on float inputs.

    By the names of the plans and of the layers, from one walk of the float `model`, which stays as it is.
    """
    device = next(model.parameters()).device
    batches = [b.to(device) for b in torch.split(ids, max(BATCH_TOKENS // ids.shape[1], 1))]
    stages = arch.find_stages(model)[0]
    needs = frozenset({"hessian"}).union(*(plan.needs for plan in plans.values()))
    gathered: dict[int, Statistics] = {}

    def observe(index: int, batch: int, x: Tensor) -> None:
        if index not in gathered:
            gathered[index] = Statistics(needs, x.shape[-1], x.device)
        gathered[index].add(batch, x)

    found: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in plans}
    for index in walk(_body(model), batches, stages, observe):
        statistics = gathered.pop(index, None)
        for name, plan in plans.items():
            for stage in plan.select([stages[index]]):
                layers = solve(stage, plan, statistics, lambda layer: None, install=False)
                found[name] |= {layer.name: (layer.loss, layer.relative_loss) for layer in layers}
    return found


def _collected(plan: Plan) -> frozenset[str]:
    """Return what the walk collects: what is needed, and with statistics of inputs a Hessian to tell losses by."""
    looks = plan.walk_needs <= {"extremes", "blocks", "float_blocks"}
    return plan.walk_needs if looks else plan.walk_needs | {"hessian"}


class _Gathered:
    """What a walk has collected for the stages that wait to be solved."""

    def __init__(self, needs: frozenset[str], batches: int) -> None:
        self.needs = needs
        self.held = frozenset(range(HELD - 1, batches, HELD)) or frozenset(range(1, batches)[-1:])
        self.statistics: dict[int, Statistics] = {}
        self.calls: dict[int, list[Call]] = {}
        self.float_inputs: dict[tuple[int, int], Tensor] = {}
        self.float_calls: dict[int, list[Call]] = {}

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
        if not isinstance(x, Tensor):
            found.float_calls.setdefault(index, []).append(x)
        elif "drift" in plan.needs and moe.expert_of(stages[index].names[0]) is None:
            found.float_inputs[index, batch] = x.detach()

    return walk(_body(twin), batches, stages, keep)


def _rescale(model: nn.Module, plan: Plan, transform: Transform, batches: list[Tensor]) -> dict[str, dict[str, float]]:
    """Choose scales for every group of layers that allows it, from one walk of the float model; then apply them all.

    Returns, by layer, what the widest channel of its input was and became, where extremes were collected.
    """
    folds = [f for f in fold.find(model) if any(name in plan.layers for name in f.consumers)]
    folds = [f for f in folds if f.producer.kind.split()[0] in transform.producers]
    stages = [Stage((f.observed,), (model.get_submodule(f.observed),)) for f in folds]
    gathered: dict[int, Statistics] = {}

    def observe(index: int, batch: int, x: Tensor) -> None:
        if index not in gathered:
            gathered[index] = Statistics(frozenset(transform.needs), x.shape[-1], x.device)
        gathered[index].add(batch, x)

    chosen: list[tuple[fold.Fold, Tensor, Tensor | None]] = []
    for index in walk(_body(model), batches, stages, observe):
        if index in gathered:
            names = [name for name in folds[index].consumers if name in plan.layers]
            fields = gathered.pop(index).fields()
            weights = [arch.get_weight(model.get_submodule(name)) for name in names]
            if "hessian" in transform.needs:
                weights = [_balanced(w, fields["hessian"]) for w in weights]
            weight = torch.cat(weights)
            fmt = min((plan.layers[name].format for name in names), key=lambda f: f.grid.bits)  # they share the scales
            problem = Problem(" + ".join(names), weight, fmt, inputs=plan.layers[names[0]].inputs, **fields)
            low, high = problem.extremes or (None, None)
            widths = None if low is None or high is None else torch.maximum(low.abs(), high.abs())
            chosen.append((folds[index], transform.scales(problem, folds[index].tie), widths))
    facts: dict[str, dict[str, float]] = {}
    for group, scales, widths in chosen:
        applied = group.apply(model, scales, plan.dtype)
        if widths is not None:
            ends = {"widest_input": float(widths.max()), "smoothed_to": float((widths / applied).max())}
            facts |= dict.fromkeys(group.consumers, ends)
    touched = {name for group, _, _ in chosen for name in (*group.consumers, *group.extra, group.producer.name)}
    for name in touched - set(plan.layers):  # what stays in float is computed with as it will be saved
        module = model.get_submodule(name)
        arch.set_weight(module, arch.get_weight(module).to(plan.dtype))
    return facts


def _balanced(weight: Tensor, hessian: Tensor) -> Tensor:
    """Scale `weight` by a power of two to an output energy of about 1, so that every consumer's error counts alike."""
    energy = float((linear(weight, hessian) * weight).double().sum())
    return weight * 2.0 ** -round(math.log2(energy) / 2) if energy > 0 else weight


def _tune(stage: Stage, plan: Plan, calls: list[Call], float_calls: list[Call]) -> dict[str, Range]:
    """Run the plan's tuners on one block; return the ranges of its layers by full name."""
    (path,), (block,) = stage.names, stage.modules
    inside = [p for name, p in plan.layers.items() if name.startswith(f"{path}.")]
    schemes = {p.name.removeprefix(f"{path}."): Scheme(p.format, p.inputs) for p in inside}
    ranges: dict[str, Range] = {}
    for tuner in plan.recipe.tuners if calls else ():
        ranges |= {f"{path}.{name}": r for name, r in tuner.tune(block, schemes, calls, float_calls).items()}
    return ranges
