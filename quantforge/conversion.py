"""The same numbers in another container: codes are carried over, never rounded again.

What may change is how a number is spelled. A scale in bfloat16 becomes one in float16 if it is the same number there,
blocks of 128 become four of 32 with one scale, a symmetric format gets zero points that are all 0, quantized scales
are written out. Each layer is held against what it was, bit for bit in float32, before anything is written; that the
files hold what was to be written is checked by every save.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantforge import checkpoint, exporters, stored
from quantforge.errors import PlanError
from quantforge.numerics.blocks import Block, spread, tiles, within_rows
from quantforge.numerics.formats import Format
from quantforge.numerics.qtensor import QTensor
from quantforge.plan import Plan
from quantforge.protocols import Exporter
from quantforge.result import Result
from quantforge.store import check_target


@dataclass(frozen=True)
class Conversion:
    """What a checkpoint becomes in another container.

    before, after  the containers
    formats        of each layer by name, before and after
    result         what is written
    notes          what the user should know
    """

    before: str
    after: str
    formats: dict[str, tuple[Format, Format]]
    result: Result
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "from": self.before,
            "to": self.after,
            "layers": [{"name": n, "from": str(a), "to": str(b)} for n, (a, b) in self.formats.items()],
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """Return it as lines: each layer with its format before and after, the notes, and the containers."""
        width = max(map(len, self.formats), default=5)
        lines = [f"{name:{width}}  {a} -> {b}" for name, (a, b) in self.formats.items()]
        told = f"{len(self.formats)} layers: {self.before} -> {self.after}, the same numbers"
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), told])


def convert(folder: str | Path, container: str, out: str | Path, *, overwrite: bool = False) -> Conversion:
    """Write the checkpoint in `folder` to `out` in another container, which holds the same numbers, and return how.

    container  "compressed-tensors", "gptq", "awq", "bitsandbytes", "gguf" or "native"

    Raises PlanError, before anything is written, for a container that cannot hold them exactly, with the reason; and
    ModelError for a checkpoint that is damaged, or was not written by quantforge.
    """
    check_target(Path(out), overwrite=overwrite, inputs=(Path(folder),))
    made = prepare(folder, container)
    made.result.save(Path(out), container, overwrite=overwrite)
    return made


def prepare(folder: str | Path, container: str) -> Conversion:
    """Return what `convert` would write, with every check of it made; nothing is written."""
    exporters.named(container)  # which knows the names
    old = checkpoint.open_result(folder)
    before = stored.open_folder(Path(folder)).container
    exporter = exporters.choose(old.plan, container)
    plan = _planned(old.plan, container, exporter)
    reason = exporter.refuses(plan)
    if reason:
        raise PlanError(253, reason)
    layers, formats = [], {}
    for layer in old.layers:
        fmt = plan.layers[layer.name].format
        formats[layer.name] = (layer.weight.base.format, fmt)
        try:
            weight = replace(layer.weight, base=recast(layer.weight.base, fmt))
        except ValueError as error:
            kept = "native holds" if before == "native" else f"{before} or native holds"
            raise PlanError(290, f"{container} would change {layer.name}: {error}; {kept} it as it is.") from error
        layers.append(replace(layer, weight=weight))
    dtype, notes = _dtype_of_floats(old, exporter, container)
    count = old.plan.kept[0]
    plan = replace(plan, dtype=dtype, kept=(count, count * dtype.itemsize))
    return Conversion(before, container, formats, replace(old, plan=plan, layers=tuple(layers)), notes)


def _planned(plan: Plan, container: str, exporter: Exporter) -> Plan:
    """Return `plan` with every format as the container stores it."""
    scales = exporter.dtypes(plan.dtype)[1]

    def fixed(fmt: Format) -> Format:
        found = exporter.fix(fmt)
        return found if scales is None else found.with_scale(scales)

    layers = {name: replace(p, format=fixed(p.format)) for name, p in plan.layers.items()}
    recipe = replace(plan.recipe, weights=fixed(plan.recipe.weights))
    return replace(plan, recipe=recipe, layers=layers, container=container, scales=scales)


def _dtype_of_floats(old: Result, exporter: Exporter, container: str) -> tuple[torch.dtype, tuple[str, ...]]:
    """Return the dtype in which the container's floats are stored: its own if it holds them, else the checkpoint's."""
    own = old.plan.dtype
    wanted = exporter.dtypes(own)[0]
    lost = None if wanted == own else _first_lost(old.model, set(old.plan.layers), wanted)
    if lost is None:
        return wanted, ()
    name, kept = lost, str(own).removeprefix("torch.")
    return own, (f"{name} holds numbers that are none of {container}'s {wanted}, so floats stay in {kept}",)


def _first_lost(model: nn.Module, layers: set[str], dtype: torch.dtype) -> str | None:
    """Return the first parameter beside the quantized weights that `dtype` cannot hold exactly, or None."""
    for name, parameter in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if part == "weight" and layer in layers:
            continue
        if not torch.equal(parameter.detach().to(dtype).to(parameter.dtype), parameter.detach()):
            return name
    return None


def recast(q: QTensor, fmt: Format) -> QTensor:
    """Return the numbers of `q` in another format; ValueError with the reason if that holds others."""
    if q.format == fmt:
        return q
    if q.format.centered or fmt.centered:
        raise ValueError(f"{q.format} and {fmt} take the mean off differently")
    values = q.format.grid.decode(q.codes)
    codes = fmt.grid.encode(values)
    if not torch.equal(fmt.grid.decode(codes), values):
        raise ValueError(f"its codes in {q.format.grid.name} are not all values of {fmt.grid.name}")
    scale = _recast_scale(q, fmt)
    made = QTensor(fmt, codes, scale, None if fmt.symmetric else _recast_zero(q, fmt))
    if fmt.symmetric:
        _check_no_zero(q, fmt)
    if not torch.equal(made.dequantize(torch.float32), q.dequantize(torch.float32)):
        raise ValueError(f"{fmt} rounds its products otherwise than {q.format}")
    return made


def _recast_scale(q: QTensor, fmt: Format) -> Tensor | QTensor:
    if isinstance(fmt.scale, Format):
        if not isinstance(q.scale, QTensor) or q.scale.format != fmt.scale or not _same_blocks(q, fmt.block):
            raise ValueError(f"its scales are no codes of {fmt.scale}")
        return q.scale
    dense = q.scale.dequantize(torch.float32) if isinstance(q.scale, QTensor) else q.scale.float()
    return _exact(_cut(dense, q, fmt.block), fmt.scale, "scale")


def _recast_zero(q: QTensor, fmt: Format) -> Tensor | QTensor:
    """Return zero points, or minima, as `fmt` stores them."""
    if isinstance(fmt.zero, Format):
        if q.zero is None or not isinstance(q.zero, QTensor) or q.zero.format != fmt.zero:
            raise ValueError(f"its zero points are no codes of {fmt.zero}")
        return q.zero
    if fmt.minimum and q.format.minimum:
        assert isinstance(q.zero, Tensor)
        return _exact(_cut(q.zero.float(), q, fmt.block), fmt.zero, "minimum")
    zero = _cut(_zero_points(q), q, fmt.block)
    if not fmt.minimum:
        inside = (zero >= fmt.grid.low).all() and (zero <= fmt.grid.high).all()
        if fmt.zero is None and not inside:
            raise ValueError(f"its zero points lie outside {fmt.grid.name}")
        return _exact(zero, fmt.zero or torch.int8, "zero point")
    dense = q.scale.dequantize(torch.float32) if isinstance(q.scale, QTensor) else q.scale.float()
    lowest = (fmt.grid.low - zero.double()) * _cut(dense, q, fmt.block).double()
    return _exact(lowest, fmt.zero, "minimum")


def _zero_points(q: QTensor) -> Tensor:
    """Return the zero point of each block in units of a code; 0 where there are none."""
    found = q.zero_points()
    if found is None:
        count = q.scale.codes if isinstance(q.scale, QTensor) else q.scale
        return torch.zeros(count.shape, dtype=torch.float32, device=q.codes.device)
    return found


def _check_no_zero(q: QTensor, fmt: Format) -> None:
    if q.zero is not None and _zero_points(q).any():
        raise ValueError(f"it has zero points, and {fmt} has none")


def _exact(x: Tensor, dtype: torch.dtype | Format | None, what: str) -> Tensor:
    """Return `x` in `dtype`; ValueError naming the first number that is another one there."""
    assert isinstance(dtype, torch.dtype)
    made = x.to(dtype)
    lost = made.to(x.dtype) != x
    if bool(lost.any()):
        value = float(x[lost][0])
        raise ValueError(f"its {what} {value:.9g} is no number of {str(dtype).removeprefix('torch.')}")
    return made


def _same_blocks(q: QTensor, block: Block) -> bool:
    shape = q.shape
    return q.format.block == block or (
        within_rows(shape, q.format.block) is not None
        and within_rows(shape, q.format.block) == within_rows(shape, block)
    )


def _cut(stat: Tensor, q: QTensor, block: Block) -> Tensor:
    """Return a value a block of `q` as one a block of another cut; ValueError where that would mix blocks."""
    if _same_blocks(q, block):
        return stat.reshape(tiles(q.codes, block).shape[:2]) if stat.dim() == 2 else stat
    each = tiles(spread(stat, q.shape, q.format.block), block)
    if not bool((each == each[..., :1]).all()):
        raise ValueError(f"blocks of {q.format} do not make up those asked for")
    return each[..., 0].contiguous()
