"""compressed-tensors `pack-quantized`: integer weights of 2 to 8 bits that stock transformers and vLLM load.

Codes are packed by the compressed-tensors library itself. A loader computes (q − z) · s in the dtype in which it loads
the scales, which is what `QTensor.dequantize` computes, so its weights equal ours bit for bit.

The layout is that of the releases up to 0.17, which vLLM pins: as many whole codes as fit into 32 bits, so that 3-bit
codes take 3.2 bits on disk, 5-bit codes 5.33, 6-bit codes 6.4 and 7-bit codes 8; 2, 4 and 8 bits are the same in every
release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.models import moe
from quantforge.numerics.blocks import Flat, counts
from quantforge.numerics.formats import SCALE_DTYPES, Format
from quantforge.numerics.grids import IntGrid, int_grid
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.plan import Plan
from quantforge.registry import register

_ALL_EXPERTS = r"re:.*\.experts\.\d+\..*"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@register("exporter", "compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors:
    """`pack-quantized` checkpoints of the compressed-tensors library."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether `plan` has only integer formats of this container; low-rank factors go beside it."""
        return all(_plain(p.format) and not p.solver.extends_format and not p.inputs for p in plan.layers.values())

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, and what could; None if it can."""
        transposed = [p.name for p in plan.layers.values() if p.transposed]
        if transposed:
            return (
                f"compressed-tensors holds nn.Linear only, and {transposed[0]} (with {len(transposed) - 1} more) is a "
                "Conv1D; quantize in memory from Python, or use `quantforge compare`, which needs no checkpoint."
            )
        for p in plan.layers.values():
            if not _plain(p.format):
                return (
                    f"compressed-tensors cannot hold {p.format} of {p.name}; int2 to int8 by group or channel it can."
                )
        uneven = [p for p in plan.layers.values() if p.shape[1] % (_columns(p.format) or 1)]
        if uneven:
            widths = sorted({p.shape[1] for p in uneven})
            group = _columns(uneven[0].format)
            sizes = [
                n for n in (256, 128, 96, 64, 48, 32, 16) if all(p.shape[1] % n == 0 for p in plan.layers.values())
            ]
            works = ", ".join(map(str, sizes)) or "-1 (a whole row)"
            return (
                f"group size {group} does not divide the {' and '.join(map(str, widths))} inputs of {len(uneven)} "
                f"layers (first {uneven[0].name}); these sizes divide every layer: {works}."
            )
        return _refuses_experts(plan)

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name; factors stand elsewhere."""
        q = weight.base
        assert isinstance(q.scale, Tensor)
        bits, half = q.format.grid.bits, 1 << (q.format.grid.bits - 1)
        signed = (q.codes.to(torch.int16) - half).to(torch.int8)
        out = {
            f"{name}.weight_packed": pack_to_int32(signed, bits),
            f"{name}.weight_scale": q.scale.contiguous(),
            f"{name}.weight_shape": torch.tensor(q.shape),
        }
        if isinstance(q.zero, Tensor):
            out[f"{name}.weight_zero_point"] = pack_to_int32(q.zero.contiguous(), bits, packed_dim=0)
        return out

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`, in keys that every reader of the format has long known.

        linears  names of all nn.Linear modules of the model; those that the plan leaves alone are listed as ignored
        """
        by_format: dict[Format, list[str]] = {}
        for p in plan.layers.values():
            by_format.setdefault(p.format, []).append(p.name)
        groups = {}
        for i, (fmt, names) in enumerate(by_format.items()):
            # a file of one format says so for all layers; one of several names each layer
            targets = ["Linear"] if len(by_format) == 1 else _targets(names)
            groups[f"group_{i}"] = {"targets": targets, "weights": _scheme(fmt)}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [name for name in linears if name not in plan.layers],
        }

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`, all those of a checkpoint.

        Raises ModelError for another format, and for tensors that are missing or do not fit together.
        """
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
            found = f"{config.get('quant_method')} / {config.get('format')}"
            raise ModelError(
                370, f"the checkpoint is in {found}; quantforge reads compressed-tensors / pack-quantized."
            )
        schemes = _read_schemes(config.get("config_groups"))
        layers = {}
        for key in list(tensors):
            name, _, part = key.rpartition(".")
            if part == "weight_packed":
                fmt = next((f for targets, f in schemes if _is_target(name, targets)), None)
                if fmt is None:
                    raise ModelError(371, f"no config group of the checkpoint says how {name} is stored.")
                parts = {p: tensors.pop(f"{name}.{p}", None) for p in _PARTS}
                layers[name] = QWeight(_unpack(name, fmt, parts), {})
        return layers


def _plain(fmt: Format) -> bool:
    scaled = isinstance(fmt.scale, torch.dtype) and fmt.zero is None and not fmt.centered
    return isinstance(fmt.grid, IntGrid) and scaled and not isinstance(fmt.block, Flat) and fmt.block[0] == 1


def _columns(fmt: Format) -> int | None:
    assert not isinstance(fmt.block, Flat)
    return fmt.block[1]


def _targets(names: list[str]) -> list[str]:
    """Name each layer, and all experts by a pattern: that is how stock loaders know their format from the others'."""
    plain = [name for name in names if not moe.expert_of(name)]
    return [*plain, _ALL_EXPERTS] if len(plain) < len(names) else plain


def _refuses_experts(plan: Plan) -> str | None:
    """Return why stock loaders, which put the experts of a block together as they read, could not read `plan`."""
    experts = [p for p in plan.layers.values() if moe.expert_of(p.name)]
    others = f"(with {len(experts) - 1} more)"
    floats = [name for name in plan.floats if moe.expert_of(name)]
    if floats:
        return (
            f"stock loaders lose experts that are not quantized, such as {floats[0]} (with {len(floats) - 1} more); "
            "quantize all experts, or keep the result in memory."
        )
    if any(not p.format.symmetric for p in experts):
        return f"stock loaders drop the zero points of experts, such as {experts[0].name} {others}; --symmetric works."
    if any(p.corrections for p in experts):
        return f"no adapter fits experts such as {experts[0].name} {others}; a method without low-rank factors works."
    odd = next((p for p in experts if p.format != experts[0].format), None)
    if odd is not None:
        return (
            f"stock loaders read all experts in one format, but {experts[0].name} is {experts[0].format} and "
            f"{odd.name} is {odd.format}; give all experts one format."
        )
    return None


def _scheme(fmt: Format) -> dict[str, Any]:
    assert not isinstance(fmt.block, Flat)
    weights: dict[str, Any] = {
        "num_bits": fmt.grid.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": "group" if fmt.block[1] else "channel",
        "dynamic": False,
    }
    if fmt.block[1]:
        weights["group_size"] = fmt.block[1]
    return weights


def _is_target(name: str, targets: list[str]) -> bool:
    return any(t == "Linear" or t == name or (t.startswith("re:") and re.match(t[3:], name)) for t in targets)


def _read_schemes(groups: object) -> list[tuple[list[str], Format]]:
    """Return (targets, format) of each config group; the dtype of scales is known from the tensors only."""
    if not isinstance(groups, dict) or not groups:
        raise ModelError(371, "the checkpoint has no config groups that say how its layers are stored.")
    found = []
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ModelError(371, "a config group of the checkpoint does not say which layers it is for.")
        found.append((targets, _read_scheme(group)))
    return sorted(found, key=lambda pair: "Linear" in pair[0])  # names before what stands for all


def _read_scheme(group: object) -> Format:
    args = group.get("weights") if isinstance(group, dict) else None
    args = args if isinstance(args, dict) else {}
    bits, symmetric, size = args.get("num_bits"), args.get("symmetric"), args.get("group_size")
    known = type(bits) is int and 2 <= bits <= 8 and type(symmetric) is bool and args.get("type") == "int"
    by_group = args.get("strategy") == "group" and type(size) is int and size > 0
    if not known or not (by_group or args.get("strategy") == "channel") or args.get("actorder"):
        raise ModelError(374, f"weights stored as {args} cannot be read; int2 to int8 by group or channel can.")
    assert isinstance(bits, int)
    assert isinstance(symmetric, bool)
    return Format(int_grid(bits), (1, size if by_group else None), symmetric)


def _unpack(name: str, fmt: Format, parts: Mapping[str, Tensor | None]) -> QTensor:
    bits, symmetric = fmt.grid.bits, fmt.symmetric
    needed = _PARTS[: 3 if symmetric else 4]
    missing = [p for p in needed if parts[p] is None]
    if missing:
        raise ModelError(372, f"{name} lacks {', '.join(missing)}; the checkpoint is incomplete.")
    packed, scale, shape_tensor, zero_packed = (parts[p] for p in _PARTS)
    assert packed is not None
    assert scale is not None
    assert shape_tensor is not None
    shape = tuple(shape_tensor.flatten().tolist()) if not shape_tensor.is_floating_point() else ()
    if len(shape) != 2 or min(shape) < 1 or shape_tensor.dim() != 1:
        raise ModelError(375, f"{name}.weight_shape is {shape_tensor.tolist()}, not the two sizes of a weight.")
    per_int = 32 // bits
    down, across = counts(shape, fmt.block)
    wanted = {"packed": (shape[0], -(-shape[1] // per_int)), "scale": (down, across)}
    found = {"packed": tuple(packed.shape), "scale": tuple(scale.shape)}
    fits = packed.dtype == torch.int32 and scale.dtype in SCALE_DTYPES.values()
    if not symmetric and zero_packed is not None:
        wanted["zero_point"], found["zero_point"] = (-(-down // per_int), across), tuple(zero_packed.shape)
        fits = fits and zero_packed.dtype == torch.int32
    if found != wanted or not fits:
        raise ModelError(373, f"{name}: {found} do not fit a weight of {shape} in {fmt}, which has {wanted}.")
    half = 1 << (bits - 1)
    signed = unpack_from_int32(packed, bits, torch.Size(shape))
    zero = None
    if not symmetric and zero_packed is not None:
        zero = unpack_from_int32(zero_packed, bits, torch.Size((down, across)), packed_dim=0).contiguous()
    return QTensor(fmt.with_scale(scale.dtype), (signed.to(torch.int16) + half).to(torch.uint8), scale, zero)
