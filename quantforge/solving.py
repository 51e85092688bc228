"""One stage solved: its layers as one matrix where they can be, corrected, judged, and put in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import fallbacks
from quantforge.calibrate.stats import Statistics
from quantforge.models import activations, arch, moe
from quantforge.models.walk import Stage
from quantforge.numerics.formats import Format
from quantforge.numerics.inputs import QInput, settle
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.numerics.ranges import Range
from quantforge.numerics.residuals import Columns, Residual
from quantforge.plan import LayerPlan, Plan


class UnreadWeight(QWeight):
    """A quantized weight that lies on disk: what is large of it is read whenever it is asked for, and not kept."""

    def __init__(
        self,
        read: Callable[[], QWeight],
        notes: dict[str, Any],
        inputs: QInput | None,
        nbits: int,
        shape: tuple[int, int],
        format: Format,
    ) -> None:
        """Take what reads all of it, and what is known of it without."""
        own = {"read": read, "notes": notes, "inputs": inputs, "_nbits": nbits, "shape": shape, "format": format}
        for name, value in own.items():
            object.__setattr__(self, name, value)  # it is frozen

    read: Callable[[], QWeight]
    shape: tuple[int, int]
    format: Format
    _nbits: int

    @property
    def base(self) -> QTensor:
        """Return the codes, from disk."""
        return self.read().base

    @property
    def residuals(self) -> tuple[Residual, ...]:
        """Return what is kept beside the codes, from disk."""
        return self.read().residuals

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""
        return self._nbits


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

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.weight.shape if isinstance(self.weight, UnreadWeight) else self.weight.base.shape

    @property
    def format(self) -> Format:
        """Return how its codes are stored."""
        return self.weight.format if isinstance(self.weight, UnreadWeight) else self.weight.base.format


Progress = Callable[[Layer], None]


def _joined(found: list[Range | None]) -> Range | None:
    """Return the ranges of layers that are stacked along the rows as one; None where they are left to the solver."""
    known = [r for r in found if r is not None]
    if len(known) < len(found):
        return None
    return Range(torch.cat([r.scale for r in known]), torch.cat([r.zero for r in known]))


def solve(
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

    An expert that saw few of all `total` tokens, and any layer that saw none, is rounded: what it saw says too little
    of what it will see.
    """
    start = time.perf_counter()
    modules = dict(zip(stage.names, stage.modules, strict=True))
    fields: dict[str, Any] = {}
    seen = 0 if found is None else found.tokens
    width = plan.layers[stage.names[0]].shape[1]
    few = bool(plan.walk_needs) and (not seen or moe.starved(stage.names[0], seen, width, total))
    if found is not None:
        fields = found.fields()
        if install:  # whoever only looks solves from them again
            found.let_go()
    elif plan.walk_needs:  # no batch came here: zeros say that nothing is known, and the solver rounds
        fields = _nothing(plan, arch.get_weight(stage.modules[0]))
    done = []
    for group in _stacks([plan.layers[name] for name in stage.names]):
        weights = [arch.get_weight(modules[p.name]) for p in group]
        stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
        trained = _joined([ranges.get(p.name) for p in group])
        problem = Problem(" + ".join(p.name for p in group), stacked, group[0].format, range=trained, **fields)
        blank = problem
        if few:
            blank = Problem(problem.name, stacked, group[0].format, range=trained, **_nothing(plan, stacked))
        rounds = _settled(group[0], problem, plan.dtype, few=few)
        solved = _compressed(group[0], blank, rounds, plan.dtype)
        approx = solved.dequantize()
        fallbacks.check_solved(problem.name, stacked, approx)
        errors, energies = problem.row_losses(approx), problem.row_energies()
        top = 0
        for p in group:
            rows = slice(top, top + p.shape[0])
            top = rows.stop
            loss, energy = (float(v[rows].double().sum()) for v in (errors, energies))
            weight = _part(solved, rows, [p.name for p in group])
            weight = replace(weight, notes={**weight.notes, **fallbacks.facts(weight, found)})
            done.append((p.name, weight, loss, loss / energy if energy > 0 else 0.0))
            if install:
                put_in_place(modules[p.name], weight, approx[rows])
    each = (time.perf_counter() - start) / len(done)
    layers = [Layer(name, weight, loss, relative, seen, each) for name, weight, loss, relative in done]
    for layer in layers:
        progress(layer)
    return layers


def put_in_place(module: nn.Module, weight: QWeight, approx: Tensor | None = None) -> None:
    """Let `module` compute with a quantized weight, and round its inputs as that says.

    approx  its numbers in float32, where they are known already
    """
    own = next(module.parameters()).dtype
    if approx is None or (weight.residuals and own != approx.dtype):  # a sum of parts is rounded as loaders round it
        approx = weight.dequantize(own if weight.residuals else torch.float32)
    arch.set_weight(module, approx)
    if weight.inputs is not None:
        activations.gate(module, weight.inputs)


def _nothing(plan: Plan, weight: Tensor) -> dict[str, Any]:
    """Return the statistics of a layer that saw no token, by the fields of a Problem."""
    return Statistics(plan.walk_needs, weight.shape[1], weight.device).fields()


def _settled(p: LayerPlan, problem: Problem, dtype: torch.dtype, *, few: bool) -> QInput | None:
    """Return how the layer will round its inputs, with what calibration was to find.

    A layer that saw few tokens finds it anew in every input.
    """
    if p.inputs is None:
        return None
    if few and p.inputs.needs:
        return QInput(replace(p.inputs, static=False, dynamic=True))
    if not p.inputs.needs:
        return QInput(p.inputs)
    assert problem.extremes is not None
    return settle(p.inputs, *problem.extremes, dtype)


def _compressed(p: LayerPlan, problem: Problem, rounds: QInput | None, dtype: torch.dtype) -> QWeight:
    """Solve and correct `problem`; the columns whose inputs stay in float stay in float too."""
    rest, kept = _spare(problem, rounds, dtype)
    solved = p.solver.solve(rest)
    for correction in p.corrections:
        solved = correction.correct(rest, solved)
    if kept is not None:  # last, so that nothing is added to what stays in float
        notes = {**solved.notes, "float_columns": len(kept.index)}
        solved = replace(solved, notes=notes, residuals=(*solved.residuals, kept))
    return replace(solved, inputs=rounds)


def _spare(problem: Problem, rounds: QInput | None, dtype: torch.dtype) -> tuple[Problem, Columns | None]:
    """Return what is left to solve where some inputs stay in float, and their columns, which stay in float too.

    Those columns, and what was seen of their inputs, are zeros to the solver: they widen no range.
    """
    if rounds is None or rounds.spared is None or not len(rounds.spared):
        return problem, None
    index = rounds.spared.long()
    hessian, magnitude = problem.hessian, problem.magnitude
    if hessian is not None:
        hessian = hessian.index_fill(0, index, 0.0).index_fill(1, index, 0.0)
    if magnitude is not None:
        magnitude = magnitude.index_fill(0, index, 0.0)
    weight = problem.weight.index_fill(1, index, 0.0)
    rest = replace(problem, weight=weight, hessian=hessian, magnitude=magnitude, drift=None)
    return rest, Columns(rounds.spared, problem.weight[:, index].to(dtype))


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
        unit = p.format.cut_unit
        last = stacks[-1][-1] if stacks else p
        alone = p.corrections or last.corrections or not p.solver.by_row
        alike = (p.format, p.solver, p.inputs) == (last.format, last.solver, last.inputs)
        if stacks and unit and not alone and alike and last.shape[0] % unit == 0:
            stacks[-1].append(p)
            continue
        stacks.append([p])
    return stacks
