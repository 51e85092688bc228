"""The plan: what every layer becomes, checked before any weight is read or any data needed."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantforge.errors import PlanError, nearest
from quantforge.models import arch, fold
from quantforge.models.walk import Stage
from quantforge.numerics.formats import Format
from quantforge.numerics.inputs import Inputs
from quantforge.protocols import Correction, Solver, Tuner
from quantforge.recipe import Recipe


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    name         full module name
    shape        (out, in)
    format       how it will be stored
    solver       how its codes are chosen
    corrections  what is added to the result
    transposed   True for GPT-2's Conv1D, which holds [in, out]
    inputs       how it rounds its inputs when it is called; None: not at all
    """

    name: str
    shape: tuple[int, int]
    format: Format
    solver: Solver
    corrections: tuple[Correction, ...] = ()
    transposed: bool = False
    inputs: Inputs | None = None

    @property
    def nbits(self) -> int:
        """Count the bits of codes, scales, zero points and corrections; single weights kept in float come on top."""
        return self.format.nbits(self.shape) + sum(c.nbits(self.shape) for c in self.corrections)

    @property
    def bits_per_weight(self) -> float:
        """Bits of one weight with its share of all that is stored."""
        return self.nbits / (self.shape[0] * self.shape[1])

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics that its solver, corrections and rounded inputs want."""
        own = self.inputs.needs if self.inputs else ()
        return (*self.solver.needs, *(need for c in self.corrections for need in c.needs), *own)


@dataclass(frozen=True)
class Plan:
    """A recipe laid over a model.

    recipe     what is done
    stages     names of the layers that are solved together, in the order of the forward
    layers     by full name, in the same order
    kept       parameters that stay as they are: (count, bytes in the checkpoint's dtype)
    dtype      the checkpoint's dtype, in which floats are stored
    notes      what the user should know
    floats     names of the layers of the decoder blocks that stay in float
    fused      names of the modules of fused experts, which hold no layers and stay in float
    known      False if the architecture is not in the table: nobody has looked at how its layers are called
    config     the model's own config
    container  the exporter that the user named; "" leaves the choice to the formats
    scales     the dtype of scales; None: the checkpoint's
    """

    recipe: Recipe
    stages: tuple[tuple[str, ...], ...]
    layers: dict[str, LayerPlan]
    kept: tuple[int, int]
    dtype: torch.dtype
    notes: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    known: bool = True
    config: Any = None
    container: str = ""
    scales: torch.dtype | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Return the statistics that any of its parts wants; empty if it needs no data."""
        return self.walk_needs.union(*(t.needs for t in self.recipe.transforms))

    @property
    def walk_needs(self) -> frozenset[str]:
        """Return what is wanted of the walk in which layers are solved: all but what transforms look at before it."""
        return frozenset().union(*(p.needs for p in self.layers.values()), *(t.needs for t in self.recipe.tuners))

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per weight of the quantized layers, all that is stored counted."""
        weights = sum(p.shape[0] * p.shape[1] for p in self.layers.values())
        return sum(p.nbits for p in self.layers.values()) / max(weights, 1)

    @property
    def bytes_before(self) -> int:
        """Bytes of the float model in the checkpoint's dtype."""
        weights = sum(p.shape[0] * p.shape[1] for p in self.layers.values())
        return self.kept[1] + weights * self.dtype.itemsize

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantized layers and of all that stays as it is."""
        return self.kept[1] + sum(-(-p.nbits // 8) for p in self.layers.values())

    def select(self, stages: Sequence[Stage]) -> list[Stage]:
        """Cut a model's stages down to the layers that this plan quantizes."""
        return list(_without(stages, lambda name: name not in self.layers))

    def record(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "method": self.recipe.name,
            **({"container": self.container} if self.container else {}),
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "layers": [
                {
                    "name": p.name,
                    "shape": p.shape,
                    "format": str(p.format),
                    "inputs": str(p.inputs) if p.inputs else None,
                    "bits_per_weight": p.bits_per_weight,
                }
                for p in self.layers.values()
            ],
            "notes": self.notes,
        }

    def table(self, more: Sequence[str] = ()) -> str:
        """Return what each layer becomes as lines of text, `more` lines about all of them, and the totals."""
        width = max(map(len, self.layers), default=5)
        lines = [f"{'layer':{width}}  {'out x in':>13}  {'format':22}  bits/weight"]
        for p in self.layers.values():
            stored = f"{p.format} x {p.inputs}" if p.inputs else str(p.format)
            lines.append(f"{p.name:{width}}  {p.shape[0]:>6}x{p.shape[1]:<6}  {stored:22}  {p.bits_per_weight:.3f}")
        lines += more
        lines.append(
            f"{len(self.layers)} layers at {self.bits_per_weight:.3f} bits per weight; "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB"
            + (f" in {self.container}" if self.container else "")
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def make(model: nn.Module, recipe: Recipe, dtype: torch.dtype, scales: torch.dtype | None = None) -> Plan:
    """Lay `recipe` over `model` (its weights may be on the meta device) and check all that needs no data.

    dtype   the checkpoint's dtype
    scales  the dtype of scales; None: the checkpoint's

    Raises PlanError naming the layers and what would work.
    """
    found, note = arch.find_stages(model)
    chosen = _choose(recipe, [name for stage in found for name in stage.names])
    stages = _without(found, lambda name: name not in chosen)
    layers = {}
    for stage in stages:
        for name, module in zip(stage.names, stage.modules, strict=True):
            out, width = (int(n) for n in module.weight.shape)  # type: ignore[union-attr]
            transposed = isinstance(module, Conv1D)
            own = chosen[name]
            layers[name] = LayerPlan(
                name,
                (width, out) if transposed else (out, width),
                own.weights.with_scale(scales or dtype),
                own.solver,
                own.corrections,
                transposed,
                own.inputs,
            )
    _refuse_unfit(layers, recipe.tuners)
    _refuse_unscalable(model, recipe)
    _refuse_missing_dtypes(layers)
    quantized = {id(m.weight) for s in stages for m in s.modules}
    rest = [p for p in model.parameters() if id(p) not in quantized]
    _refuse_tied(model, stages)
    kept = sum(p.numel() for p in rest)
    notes = (note,) if note else ()
    floats = tuple(name for stage in found for name in stage.names if name not in layers)
    return Plan(
        recipe,
        tuple(s.names for s in stages),
        layers,
        (kept, kept * dtype.itemsize),
        dtype,
        notes,
        floats,
        tuple(arch.fused_experts(model)),
        known=arch.knows(model),
        config=model.config,
        scales=scales,
    )


def with_notes(plan: Plan, notes: Sequence[str]) -> Plan:
    """Return `plan` with more notes for the user."""
    return replace(plan, notes=(*notes, *plan.notes))


def _without(stages: Sequence[Stage], drop: object) -> list[Stage]:
    assert callable(drop)
    kept = []
    for stage in stages:
        pairs = [(n, m) for n, m in zip(stage.names, stage.modules, strict=True) if not drop(n)]
        if pairs:
            kept.append(Stage(tuple(n for n, _ in pairs), tuple(m for _, m in pairs)))
    return kept


def _choose(recipe: Recipe, names: list[str]) -> dict[str, Recipe]:
    """Return the recipe of each layer that is to be quantized; PlanError for an override that matches no layer."""
    chosen = {name: recipe for name in names if not any(matches(name, s) for s in recipe.skip)}
    for pattern, other in recipe.overrides:
        hit = [name for name in names if matches(name, pattern)]
        if not hit:
            parts = {part for name in names for part in (name, name.rsplit(".", 1)[-1])}
            raise PlanError(
                255,
                f"the override {pattern!r} matches no layer: {nearest(pattern, parts)}layers are called {names[0]} and "
                "so on, and a pattern such as '*.down_proj' may have wildcards.",
            )
        for name in hit:
            if other is None:
                chosen.pop(name, None)
            else:
                chosen[name] = other
    return chosen


def matches(name: str, pattern: str) -> bool:
    """Tell whether a layer's full name, or what follows one of its dots, is `pattern`, which may have wildcards."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _refuse_unfit(layers: dict[str, LayerPlan], tuners: Sequence[Tuner]) -> None:
    """Ask every layer's solver and corrections whether they can do with its shape and format."""
    for p in layers.values():
        if tuners and not p.solver.takes_ranges:
            raise PlanError(
                257, f"{p.name}: its solver finds its own ranges, so none can be trained; rtn and gptq take them."
            )
        reasons = [
            p.solver.refuses(p.shape, p.format),
            *(t.refuses(p.shape, p.format) for t in tuners),
            *(c.refuses(p.shape, p.format) for c in p.corrections),
        ]
        for reason in filter(None, reasons):
            raise PlanError(256, f"{p.name}: {reason}")


def _refuse_unscalable(model: nn.Module, recipe: Recipe) -> None:
    """A method that rescales needs something that can take the scales."""
    for transform in recipe.transforms:
        kinds = {f.producer.kind.split()[0] for f in fold.find(model)}
        if not kinds & set(transform.producers):
            what = getattr(model.config, "model_type", type(model).__name__)
            raise PlanError(
                258,
                f"{recipe.name} rescales layers, and nothing in this {what} can take the scales exactly (norms after "
                "the residual, or an architecture that is not known); a method without it works.",
            )


def _refuse_missing_dtypes(layers: dict[str, LayerPlan]) -> None:
    """A float that this build of torch cannot convert must be found out before any work."""
    for dtype, name in {dtype: name for name, p in layers.items() for dtype in p.format.dtypes}.items():
        try:
            torch.ones(1).to(dtype).float()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            what = str(dtype).removeprefix("torch.")
            raise PlanError(
                259, f"{name}: {layers[name].format} needs {what}, which this torch lacks; int4-g64-asym works."
            ) from error


def _refuse_tied(model: nn.Module, stages: Sequence[Stage]) -> None:
    """A weight that two modules share must not be quantized under one name only."""
    owners: dict[int, str] = {}
    targets = {name for s in stages for name in s.names}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        first = owners.setdefault(id(weight), name)
        if first != name and (first in targets or name in targets):
            raise PlanError(252, f"{name} and {first} share one weight, so neither can be quantized alone; skip both.")
