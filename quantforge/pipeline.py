"""The straight line: rescale the float model, walk through it once, solve each layer on the way and put it in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import stopping
from quantforge.calibrate.stats import Statistics, positions
from quantforge.course import Course, Run, body, by_block, number
from quantforge.errors import PlanError
from quantforge.models import activations, arch, moe
from quantforge.models.blocks import Blocks
from quantforge.models.walk import Call, Stage, walk
from quantforge.numerics.inputs import Scheme
from quantforge.numerics.ranges import Range
from quantforge.plan import Plan
from quantforge.protocols import Transform
from quantforge.rescaling import Facts, rescale
from quantforge.resume import Place, Record
from quantforge.solving import Layer, Progress, put_in_place, solve

BATCH_TOKENS = 2048
HELD = 8  # one batch in so many is held out where a fit to the others is to be judged


def quantize(
    model: nn.Module,
    plan: Plan,
    ids: Tensor | None = None,
    progress: Progress = lambda layer: None,
    collect: frozenset[str] = frozenset(),
    run: Run | None = None,
) -> list[Layer]:
    """Quantize `model` in place by `plan`, and return a row a layer in the order of the forward.

    The model's weights become the dequantized values of the codes, and layers that are to round their inputs do so.

    ids       token ids [windows, seq_len] to calibrate on; None for plans that need no data. Losses are those of the
              outputs where Hessians are collected, else those of the weights
    progress  called with each layer as it is done, and with each that a run that is gone on with had done
    collect   statistics that are wanted besides what the plan needs
    run       where work is kept on the way, and where it begins; None: in memory, at the beginning. If its blocks are
              streamed, their weights are dropped and rows read theirs from disk

    Raises Stopped where the process was asked to stop and the run can be gone on with.
    """
    try:
        with stopping.deferring():
            return _quantize(model, plan, ids, progress, collect, run or in_memory(model))
    except BaseException:
        activations.remove(model.modules())
        raise


def in_memory(model: nn.Module) -> Run:
    """Return a run on a model that is all in memory, of which nothing is kept on the way."""
    return Run(Blocks(model), Record(None, next(model.parameters()).device))


def _quantize(
    model: nn.Module, plan: Plan, ids: Tensor | None, progress: Progress, collect: frozenset[str], run: Run
) -> list[Layer]:
    activations.remove(model.modules())
    for name, p in plan.layers.items():
        if p.inputs is not None:
            activations.gate(model.get_submodule(name))
    if ids is None and plan.needs:
        raise PlanError(
            275, f"{plan.recipe.label} needs calibration tokens, for {', '.join(sorted(plan.needs))}; pass ids."
        )
    for layer in run.record.layers.values():
        progress(layer)
    work = _Work(plan, run, progress, dict(run.record.layers))
    batches = []
    if ids is not None:
        size = max(BATCH_TOKENS // ids.shape[1], 1)
        if "drift" in plan.needs:  # some batches must be left to judge by
            size = min(size, max(len(ids) // HELD, 1))
        batches = [b.to(run.record.device) for b in torch.split(ids, size)]
        for phase, transform in enumerate(plan.recipe.transforms):
            work.facts.append(rescale(run, phase, plan, transform, batches))
    collected = _collected(plan) | collect
    if batches and collected:
        work.total = sum(batch.numel() for batch in batches)
        work.walk(batches, collected)
    else:
        work.solve_all()
    run.record.place = Place(len(plan.recipe.transforms), len(run.blocks))
    if run.record.lean or run.record.due():
        run.record.commit()
    run.check_stop()
    return list(run.record.layers.values())


@dataclass
class _Work:
    """The last walk of a run, in which layers are solved.

    known   the layers that were done before
    total   calibration tokens that layers might see
    facts   of each transform, by layer, more for the notes
    done    layers of the block that is in work
    ranges  of its layers, where they were trained
    tuned   what else of it was trained, by full name
    """

    plan: Plan
    run: Run
    progress: Progress
    known: dict[str, Layer]
    total: int = 0
    facts: list[Facts] = field(default_factory=list)
    done: list[Layer] = field(default_factory=list)
    ranges: dict[str, Range] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)

    def walk(self, batches: list[Tensor], collected: frozenset[str]) -> None:
        """Solve layers by the inputs that they get from the layers solved before them."""
        run, plan, place = self.run, self.plan, self.run.record.place
        course = Course(run, batches, self.stages(run.blocks), place.hidden, place.outputs)
        twin = None
        if plan.needs & {"drift", "float_blocks"}:
            beside = Run(run.blocks.twin(), run.record, run.again)
            twin = Course(beside, batches, self.stages(beside.blocks), place.float_hidden, place.outputs)
        run.blocks.prepare(self.retune)
        run.blocks.prepare(self.restore)
        found = _Gathered(collected, batches, calls=bool(plan.recipe.tuners))
        ahead = repeat(0) if twin is None else _float_walk(twin, plan, found)
        next(ahead, None)
        for index in course.walk(found.observe):
            stage = course.stages[index]
            if stage.block:
                self.enter(course.at, course, twin)
                self.tune(stage, found.calls.pop(index, []), found.float_calls.pop(index, []))
            else:
                self.solve(stage, found.statistics.pop(index, None))
            next(ahead, None)
            self.check_stop()
        self.leave()
        run.blocks.forget(self.restore)

    def solve_all(self) -> None:
        """Solve layers that are to be solved by their weights alone."""
        blocks = self.run.blocks
        blocks.prepare(self.restore)
        for stage in self.stages(blocks):
            if stage.block:
                self.enter(number(blocks, stage))
                blocks.enter(number(blocks, stage))
            else:
                self.solve(stage, None)
            self.check_stop()
        self.leave()
        blocks.leave()
        blocks.forget(self.restore)

    def stages(self, blocks: Blocks) -> list[Stage]:
        """Return the stages that are still to be solved, from the block on at which the run stands."""
        stages = self.plan.select(arch.find_stages(blocks.model)[0])
        left = [stage for stage in stages if not all(name in self.known for name in stage.names)]
        return by_block(blocks, left, self.run.record.place.at)

    def restore(self, model: nn.Module, index: int) -> None:
        """Put in place the layers of block `index` that were done before this process began."""
        for name, layer in self.known.items():
            if name.startswith(f"{self.run.blocks.path}.{index}."):
                put_in_place(model.get_submodule(name), layer.weight)

    def retune(self, model: nn.Module, index: int) -> None:
        """Put in place what tuners changed in block `index` beside its layers."""
        for name, value in self.run.record.tuned.items():
            if name.startswith(f"{self.run.blocks.path}.{index}."):
                model.get_parameter(name).data.copy_(value)

    def enter(self, at: int, course: Course | None = None, twin: Course | None = None) -> None:
        """Take over the block that is done, and stand before block `at`, which all batches have reached."""
        self.leave()
        place = Place(len(self.plan.recipe.transforms), at)
        if course is not None:
            if course.hidden is None or (twin is not None and twin.hidden is None):
                return  # some batch passes the block by, and could not begin here
            floats = () if twin is None or twin.hidden is None else twin.hidden
            place = replace(place, outputs=course.outputs, hidden=course.hidden, float_hidden=floats)
        self.run.record.place = place
        if self.run.again or self.run.record.due():
            self.run.record.commit()

    def leave(self) -> None:
        """Take over all that is done of the block in work."""
        self.run.record.tune(self.tuned)
        self.run.record.add(self.done)
        self.tuned, self.done = {}, []

    def solve(self, stage: Stage, found: Statistics | None) -> None:
        """Solve one stage."""
        layers = solve(stage, self.plan, found, self.progress, self.ranges, self.total)
        self.done += [_told(layer, *(facts.get(layer.name, {}) for facts in self.facts)) for layer in layers]

    def tune(self, stage: Stage, calls: list[Call], float_calls: list[Call]) -> None:
        """Run the plan's tuners on one block."""
        (path,), (block,) = stage.names, stage.modules
        self.ranges = {}
        if not self.plan.recipe.tuners or not calls:
            return
        inside = [p for name, p in self.plan.layers.items() if name.startswith(f"{path}.")]
        schemes = {p.name.removeprefix(f"{path}."): Scheme(p.format, p.inputs) for p in inside}
        rest = {
            f"{path}.{name}": p for name, p in block.named_parameters() if name.removesuffix(".weight") not in schemes
        }
        before = {name: p.detach().clone() for name, p in rest.items()}
        for tuner in self.plan.recipe.tuners:
            found = tuner.tune(block, schemes, calls, float_calls)
            self.ranges |= {f"{path}.{name}": r for name, r in found.items()}
        self.tuned = {name: p.detach().clone() for name, p in rest.items() if not torch.equal(p, before[name])}

    def check_stop(self) -> None:
        """Keep what is done, and stop, if the process was asked to."""
        if stopping.asked() and not self.plan.recipe.tuners:  # a block whose weights they changed is begun anew
            self.leave()
        self.run.check_stop()


def _told(layer: Layer, *facts: dict[str, Any]) -> Layer:
    """Return `layer` with more facts in its notes; of tokens that were left out, its own solve's stand."""
    notes: dict[str, Any] = {}
    for more in (*facts, layer.weight.notes):
        notes |= more
    return replace(layer, weight=replace(layer.weight, notes=notes))


def _float_walk(course: Course, plan: Plan, found: _Gathered) -> Iterator[int]:
    """Walk the float model, one stage ahead, and leave what each stage gets in `found`.

    Experts are left out: the float model's router may send them other tokens, which cannot be compared.
    """

    def keep(index: int, batch: int, x: Tensor | Call) -> None:
        if not isinstance(x, Tensor):
            if plan.recipe.tuners:
                found.float_calls.setdefault(index, []).append(x)
        elif "drift" in plan.needs and moe.expert_of(course.stages[index].names[0]) is None:
            found.float_inputs[index, batch] = x.detach()

    return course.walk(keep)


def _rescale(model: nn.Module, plan: Plan, transform: Transform, batches: Sequence[Tensor]) -> Facts:
    """Do what a run does of `transform`, and no more."""
    return rescale(in_memory(model), 0, plan, transform, batches)


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
    for index in walk(body(model), batches, stages, observe):
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

    def __init__(self, needs: frozenset[str], batches: Sequence[Tensor], *, calls: bool) -> None:
        self.needs, self.batches, self.keeps_calls = needs, batches, calls
        count = len(batches)
        self.held = frozenset(range(HELD - 1, count, HELD)) or frozenset(range(1, count)[-1:])
        self.statistics: dict[int, Statistics] = {}
        self.calls: dict[int, list[Call]] = {}
        self.float_inputs: dict[tuple[int, int], Tensor] = {}
        self.float_calls: dict[int, list[Call]] = {}

    def observe(self, index: int, batch: int, x: Tensor | Call) -> None:
        """Add the input of a stage, or keep the call of a block."""
        if not isinstance(x, Tensor):
            if self.keeps_calls:
                self.calls.setdefault(index, []).append(x)
            return
        if index not in self.statistics:
            self.statistics[index] = Statistics(self.needs, x.shape[-1], x.device, self.held)
        where = positions(self.batches, batch, x.shape[:-1].numel())
        self.statistics[index].add(batch, x, self.float_inputs.pop((index, batch), None), where)
