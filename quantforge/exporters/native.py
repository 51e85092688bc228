"""quantforge's own container, for what no stock format holds: nested scales, real zero points, tables, residuals.

Safetensors like any checkpoint. A quantized layer's weight stands as

    NAME.codes                  uint8, the codes as a stream of bits
    NAME.scale                  floats, or NAME.scale.codes, NAME.scale.scale, … where scales are quantized themselves
    NAME.zero                   likewise, where there are zero points
    NAME.offset                 float32, of a centered format
    NAME.residual.N.PART        the parts of residual N: a, b; or start, columns (16 bits where they do),
                                values; or index, values

and `quantization_config` in config.json says, for each layer, its shape, its format and its residuals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.numerics import formats
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import Format
from quantforge.numerics.inputs import Inputs, QInput
from quantforge.numerics.packing import pack, unpack
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.numerics.ranges import Range
from quantforge.numerics.residuals import Columns, LowRank, Residual, Sparse
from quantforge.plan import Plan
from quantforge.registry import register

METHOD = "quantforge"
_KINDS: dict[str, type[LowRank] | type[Sparse] | type[Columns]] = {
    "low-rank": LowRank,
    "sparse": Sparse,
    "columns": Columns,
}


@register("exporter", "native")
@dataclass(frozen=True)
class Native:
    """Checkpoints in quantforge's own container; `quantforge.load` reads them."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether this is the container for the formats of `plan`: it is for any."""
        return True

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be written; None if it can."""
        transposed = [p.name for p in plan.layers.values() if p.transposed]
        if transposed:
            return (
                f"checkpoints hold nn.Linear only, and {transposed[0]} (with {len(transposed) - 1} more) is a Conv1D; "
                "quantize in memory from Python, or use `quantforge compare`, which needs no checkpoint."
            )
        return None

    def fix(self, fmt: Format) -> Format:
        """Return `fmt` as it is."""
        return fmt

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """Return the model's own dtype for floats; scales may have any."""
        return own, None

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name."""
        found = _matrix(name, weight.base)
        for i, residual in enumerate(weight.residuals):
            for f in fields(residual):  # type: ignore[arg-type]
                part = getattr(residual, f.name)
                where = f"{name}.residual.{i}.{f.name}"
                if isinstance(part, QTensor):
                    found |= _matrix(where, part)
                elif isinstance(part, Tensor):
                    short = isinstance(residual, Sparse) and f.name == "columns" and residual.width <= 1 << 16
                    found[where] = (part.to(torch.uint16) if short else part).clone()
        if weight.inputs is not None:
            for key, part in _kept_inputs(weight.inputs).items():
                found[f"{name}.input.{key}"] = part.clone()  # layers of one stage share it
        return found

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`; what is particular to a layer is added by `describe`."""
        return {"quant_method": METHOD, "version": 1, "layers": {}}

    def describe(self, weight: QWeight) -> dict[str, Any]:
        """Return what `quantization_config` says of one layer."""
        return {
            "shape": list(weight.base.shape),
            "format": formats.to_json(weight.base.format),
            "residuals": [_residual(r) for r in weight.residuals],
            "inputs": None if weight.inputs is None else _inputs(weight.inputs),
        }

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`; ModelError if damaged."""
        layers = config.get("layers")
        if config.get("version") != 1 or not isinstance(layers, dict):
            raise ModelError(380, "the checkpoint is not of version 1 of quantforge's container, the one it reads.")
        found = {}
        for name, about in layers.items():
            try:
                found[name] = _read(name, about, tensors)
            except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
                raise ModelError(381, f"{name} cannot be read from the checkpoint ({error}); it is damaged.") from error
        return found


def _matrix(name: str, q: QTensor) -> dict[str, Tensor]:
    found = {f"{name}.codes": pack(q.codes, q.format.grid.bits)}
    for part, value in (("scale", q.scale), ("zero", q.zero), ("offset", q.offset)):
        if isinstance(value, QTensor):
            found |= _matrix(f"{name}.{part}", value)
        elif value is not None:
            found[f"{name}.{part}"] = (value.view(torch.uint8) if value.dtype == formats.E8M0 else value).contiguous()
    return found


def _residual(residual: Residual) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if isinstance(residual, cls))
    about: dict[str, Any] = {"kind": kind}
    for f in fields(residual):  # type: ignore[arg-type]
        part = getattr(residual, f.name)
        if isinstance(part, QTensor):
            about[f.name] = {"shape": list(part.shape), "format": formats.to_json(part.format)}
        else:
            about[f.name] = "tensor" if isinstance(part, Tensor) else part
    return about


def _kept_inputs(rounds: QInput) -> dict[str, Tensor]:
    """Return the tensors of what calibration found about a layer's inputs."""
    found: dict[str, Tensor] = {}
    if rounds.range is not None:
        assert isinstance(rounds.inputs.format.scale, torch.dtype)
        found |= {"scale": rounds.range.scale, "zero": rounds.range.zero}
    if rounds.spared is not None:
        found["spared"] = rounds.spared
    return found


def _inputs(rounds: QInput) -> dict[str, Any]:
    inputs = rounds.inputs
    return {
        "format": formats.to_json(inputs.format),
        "static": inputs.static,
        "threshold": inputs.threshold if math.isfinite(inputs.threshold) else None,
        "dynamic": inputs.dynamic,
    }


def _read_inputs(name: str, about: Mapping[str, Any], width: int, tensors: dict[str, Tensor]) -> QInput:
    asked, static, dynamic = about["threshold"], about["static"], about["dynamic"]
    if type(static) is not bool or type(dynamic) is not bool or type(asked) not in (int, float, type(None)):
        raise ValueError(f"its inputs are {static!r}, {asked!r}, {dynamic!r}, which are no truth values and a number")
    threshold = math.inf if asked is None else float(asked)
    inputs = Inputs(formats.from_json(about["format"]), static, threshold, dynamic)
    found, spared = None, None
    if inputs.static:
        found = Range(tensors.pop(f"{name}.input.scale"), tensors.pop(f"{name}.input.zero"))
        if not all(x.shape == (1, 1) and _usable(x) for x in (found.scale, found.zero)) or not found.scale > 0:
            raise ValueError(f"{name}.input.scale is no positive number")
        zero, grid = float(found.zero), inputs.format.grid
        if zero != (0 if inputs.format.symmetric else round(zero)) or not grid.low <= zero <= grid.high:
            raise ValueError(f"{name}.input.zero is {zero:g}, no zero point of {inputs.format}")
    if math.isfinite(threshold) and not inputs.dynamic:
        spared = tensors.pop(f"{name}.input.spared")
        if spared.dim() != 1 or not _inside(spared, width):
            raise ValueError(f"{name}.input.spared does not fit {width} inputs")
    return QInput(inputs, found, spared)


def _read(name: str, about: Mapping[str, Any], tensors: dict[str, Tensor]) -> QWeight:
    rows, cols = about["shape"]
    base = _read_matrix(name, (int(rows), int(cols)), formats.from_json(about["format"]), tensors)
    residuals: list[Residual] = []
    if not isinstance(about["residuals"], list):
        raise ValueError("its residuals are no list")
    for i, part in enumerate(about["residuals"]):
        cls = _KINDS[part["kind"]]
        values: dict[str, Any] = {}
        for f in fields(cls):
            where, kept = f"{name}.residual.{i}.{f.name}", part[f.name]
            if isinstance(kept, dict):
                shape = (int(kept["shape"][0]), int(kept["shape"][1]))
                values[f.name] = _read_matrix(where, shape, formats.from_json(kept["format"]), tensors)
            else:
                values[f.name] = _widened(tensors.pop(where)) if kept == "tensor" else int(kept)
        residual = cls(**values)
        _check(residual, (int(rows), int(cols)))
        residuals.append(residual)
    about_inputs = about.get("inputs")
    rounds = None if about_inputs is None else _read_inputs(name, about_inputs, int(cols), tensors)
    return QWeight(base, {}, tuple(residuals), rounds)


def _widened(x: Tensor) -> Tensor:
    """Return indices that are stored in 16 bits as int32, in which they can be computed with."""
    return x.to(torch.int32) if x.dtype == torch.uint16 else x


def _check(residual: Residual, shape: tuple[int, int]) -> None:
    """Raise ValueError unless a residual's tensors point into a matrix of `shape`."""
    if isinstance(residual, LowRank):
        a, b = residual.factors()
        sound = a.dim() == b.dim() == 2 and (a.shape[0], b.shape[1]) == shape and a.shape[1] == b.shape[0]
        sound = sound and _usable(a) and _usable(b)
    elif isinstance(residual, Sparse):
        start, columns = residual.start, residual.columns
        sound = start.shape == (shape[0] + 1,) and start.dtype == torch.int32 and columns.dim() == 1
        sound = sound and int(start[0]) == 0 and bool((start[1:] >= start[:-1]).all())
        sound = sound and residual.values.shape == columns.shape == (int(start[-1]),) and residual.width == shape[1]
        sound = sound and _inside(columns, shape[1]) and _usable(residual.values) and _ascend(start, columns)
    else:
        assert isinstance(residual, Columns)
        sound = residual.index.dim() == 1 and residual.values.shape == (shape[0], len(residual.index))
        sound = sound and _inside(residual.index, shape[1]) and _usable(residual.values)
        sound = sound and len(set(residual.index.tolist())) == len(residual.index)
    if not sound:
        raise ValueError(f"a residual does not fit {shape}")


def _usable(x: Tensor) -> bool:
    return x.dtype in formats.SCALE_DTYPES.values() and bool(x.float().isfinite().all())


def _ascend(start: Tensor, columns: Tensor) -> bool:
    """Tell whether columns ascend within each row, so that none stands twice."""
    first = torch.zeros(len(columns) + 1, dtype=torch.bool, device=columns.device)
    first[start.long()] = True
    return bool((first[1:-1] | (columns[1:] > columns[:-1])).all())


def _inside(index: Tensor, size: int) -> bool:
    return index.dtype == torch.int32 and (not len(index) or (int(index.min()) >= 0 and int(index.max()) < size))


def _read_matrix(name: str, shape: tuple[int, int], fmt: Format, tensors: dict[str, Tensor]) -> QTensor:
    if min(shape) < 1:
        raise ValueError(f"{name} has the shape {shape}")
    codes = unpack(tensors.pop(f"{name}.codes"), fmt.grid.bits, shape[0] * shape[1]).view(shape)
    if int(codes.max()) >= len(fmt.grid.values):
        raise ValueError(f"{name} has codes that {fmt.grid.name} lacks")
    blocks = counts(shape, fmt.block)
    scale = _read_part(f"{name}.scale", blocks, fmt.scale, tensors)
    zero = None
    if not fmt.symmetric:
        zero = _read_part(f"{name}.zero", blocks, torch.int8 if fmt.zero is None else fmt.zero, tensors)
    offset = None
    if fmt.centered:
        offset = tensors.pop(f"{name}.offset")
        if offset.shape != () or offset.dtype != torch.float32 or not _usable(offset):
            raise ValueError(f"{name}.offset is no finite float32 number")
    return QTensor(fmt, codes, scale, zero, offset)


def _read_part(
    name: str, shape: tuple[int, int], kept: torch.dtype | Format, tensors: dict[str, Tensor]
) -> Tensor | QTensor:
    if isinstance(kept, Format):
        return _read_matrix(name, shape, kept, tensors)
    found = tensors.pop(name)
    if kept == formats.E8M0 and found.dtype == torch.uint8:  # safetensors reads no E8M0
        found = found.view(formats.E8M0)
    if tuple(found.shape) != shape or found.dtype != kept:
        raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}, not {kept} {shape}")
    if found.is_floating_point() and not _usable(found):
        raise ValueError(f"{name} holds numbers that are not finite")
    return found
