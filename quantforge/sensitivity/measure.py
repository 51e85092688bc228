"""Measuring: parts in the order of the first block they touch, each cell handed on as soon as it is done."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import api, pipeline, record
from quantforge.errors import PlanError
from quantforge.models import activations, arch
from quantforge.plan import Plan
from quantforge.progress import bar
from quantforge.sensitivity.prefix import Prefix
from quantforge.sensitivity.results import (
    WHOLE,
    Analysis,
    Cell,
    PartRow,
    Section,
    check_losses,
    check_same,
    from_json,
    read,
    to_json,
)


@dataclass(frozen=True)
class Job:
    """A section that is to be measured: token ids [windows, seq_len], and the layers of each part by its name."""

    by: str
    ids: Tensor
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)


def parts_of(whole: Plan, by: str) -> dict[str, tuple[str, ...]]:
    """Return the layers of each part by its name, parts in the order in which the forward reaches them."""
    named: dict[str, list[str]] = {}
    for name in whole.layers:
        own = {"block": arch.block_path(name), "kind": name.rpartition(".")[2], "layer": name}[by]
        named.setdefault(own or name, []).append(name)
    return {part: tuple(names) for part, names in named.items()}


def _first(names: Sequence[str]) -> int:
    """Return the first block that any of the layers lies in."""
    return min(arch.block_index(name) or 0 for name in names)


def new_section(
    job: Job, evaluation: dict[str, Any], plans: Mapping[str, Plan], fingerprint: str, command: str
) -> Section:
    """Return a section in which nothing has been measured.

    plans        by the name of the format, each for all layers
    fingerprint  of the model's files; "" for a model in memory
    """
    layers = next(iter(plans.values())).layers
    rows = []
    for part, names in job.parts.items():
        shapes = [layers[name].shape for name in names]
        rows.append(PartRow(part, _first(names), len(names), sum(out * width for out, width in shapes)))
    today = datetime.date.today().isoformat()
    facts = (job.by, evaluation, record.versions(), fingerprint, record.machine(), command, today)
    return Section(*facts, losses=(), formats=tuple(plans), parts=tuple(rows), cells=())


def joined(out: Path | None, found: Analysis, *, resume: bool) -> Analysis:
    """Put what `out` holds of earlier runs before the new sections, or into them."""
    earlier = None if out is None else read(out)
    if earlier is None:
        return found
    assert out is not None
    found = from_json(to_json(found))  # as the other one was: JSON has no tuples and no infinities
    check_same(out, earlier, found)
    for section in found.sections:
        old = earlier.section(section.by)
        if old is not None and not resume:
            raise PlanError(292, f"{out} has results by {section.by} already; --resume goes on with them.")
        if old is not None:
            formats = tuple(dict.fromkeys((*old.formats, *section.formats)))
            section = replace(section, formats=formats, losses=old.losses, cells=old.cells)
            section = replace(section, machine=old.machine, created=old.created, command=old.command)
        earlier = earlier.having(section)
    return replace(earlier, columns=earlier.columns | found.columns)


def missing(found: Analysis, job: Job, plans: Mapping[str, Plan]) -> list[tuple[str, str]]:
    """Return the cells (part, format) still to be measured, in the order of the blocks that they touch first."""
    section = found.section(job.by)
    assert section is not None
    order = sorted(job.parts, key=lambda part: _first(job.parts[part]))
    done = {(cell.part, cell.format) for cell in section.cells}
    return [(part, fmt) for part in (WHOLE, *order) for fmt in plans if (part, fmt) not in done]


def measure(model: nn.Module, plans: Mapping[str, Plan], job: Job, found: Analysis) -> Iterator[Section]:
    """Measure the cells that a section lacks; yield it after each.

    Raises PlanError if it has losses of a float model that are not this one's.
    """
    section = found.section(job.by)
    assert section is not None
    for twin in found.sections:  # everything at once is the same cell, however the model is cut
        if twin.by != job.by and _alike(twin, section):
            copies = tuple(c for c in twin.cells if c.part == WHOLE and section.cell(WHOLE, c.format) is None)
            wanted = tuple(c for c in copies if c.format in section.formats)
            section = replace(section, cells=(*section.cells, *wanted), losses=section.losses or twin.losses)
    left = missing(found.having(section), job, plans)
    if not left and section.fingerprint:
        yield section
        return
    reference, _ = api.kept_reference(model, job.ids, section.fingerprint)
    if section.losses:
        check_losses(section, reference.losses)
    section = replace(section, losses=section.losses or reference.losses)
    if not left:
        yield section
        return
    prefix = Prefix(model, _blocks(model, plans), job.ids, reference)
    with bar(f"by {job.by}", len(left)) as step:
        for part, fmt in left:
            names = job.parts.get(part, tuple(plans[fmt].layers))
            prefix.advance(_first(names))
            cell = _cell(model, plans[fmt], names, prefix)
            section = replace(section, cells=(*section.cells, replace(cell, part=part, format=fmt)))
            step(f"{part or 'all'} {fmt}")
            yield section


def _alike(one: Section, other: Section) -> bool:
    """Tell whether what two sections measure of the whole model is the same."""
    return all(getattr(one, name) == getattr(other, name) for name in ("evaluation", "versions", "fingerprint"))


def _blocks(model: nn.Module, plans: Mapping[str, Plan]) -> list[nn.Module]:
    """Return the decoder blocks, in order."""
    name = next(iter(next(iter(plans.values())).layers))
    path = arch.block_path(name)
    return [] if path is None else list(model.get_submodule(path.rpartition(".")[0]).children())


def _cell(model: nn.Module, whole: Plan, names: Sequence[str], prefix: Prefix) -> Cell:
    """Quantize the layers of those names, score the model, and put everything back."""
    start = time.perf_counter()
    with _restored(model, names):
        pipeline.quantize(model, replace(whole, layers={name: whole.layers[name] for name in names}))
        losses, kls = prefix.score()
    return Cell("", "", losses, kls, time.perf_counter() - start)


@contextmanager
def _restored(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Put the weights of the layers of those names back, bit for bit, and let them read their inputs in float."""
    modules = [model.get_submodule(name) for name in names]
    kept = [[p.detach().clone() for p in module.parameters()] for module in modules]
    try:
        yield
    finally:
        activations.remove(modules)
        with torch.no_grad():
            for module, parameters in zip(modules, kept, strict=True):
                for parameter, before in zip(module.parameters(), parameters, strict=True):
                    parameter.copy_(before)
