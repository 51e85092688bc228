"""compressed-tensors `pack-quantized`: integer weights of 2 to 8 bits that stock transformers and vLLM load.

Codes are packed by the compressed-tensors library itself. A loader computes (q − z) · s in the dtype in which it loads
the scales, which is what `QTensor.dequantize` computes, so its weights equal ours bit for bit.

The layout is that of the releases up to 0.17, which vLLM pins: as many whole codes as fit into 32 bits, so that 3-bit
codes take 3.2 bits on disk, 5-bit codes 5.33, 6-bit codes 6.4 and 7-bit codes 8; 2, 4 and 8 bits are the same in every
release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import SCALE_DTYPES, Format
from quantforge.numerics.grids import IntGrid, int_grid
from quantforge.numerics.qtensor import QTensor
from quantforge.plan import Plan
from quantforge.registry import register

_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@register("exporter", "compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors:
    """`pack-quantized` checkpoints of the compressed-tensors library."""

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, and what could; None if it can."""
        transposed = [p.name for p in plan.layers.values() if p.transposed]
        if transposed:
            return (
                f"compressed-tensors holds nn.Linear only, and {transposed[0]} (with {len(transposed) - 1} more) is a "
                "Conv1D; quantize in memory from Python, or use `quantforge compare`, which needs no checkpoint."
            )
        for p in plan.layers.values():
            if not isinstance(p.format.grid, IntGrid) or p.format.block[0] != 1:
                return (
                    f"compressed-tensors cannot hold {p.format} of {p.name}; int2 to int8 by group or channel it can."
                )
        uneven = [p for p in plan.layers.values() if p.format.block[1] and p.shape[1] % p.format.block[1]]
        if uneven:
            widths = sorted({p.shape[1] for p in uneven})
            group = uneven[0].format.block[1]
            sizes = [
                n for n in (256, 128, 96, 64, 48, 32, 16) if all(p.shape[1] % n == 0 for p in plan.layers.values())
            ]
            works = ", ".join(map(str, sizes)) or "-1 (a whole row)"
            return (
                f"group size {group} does not divide the {' and '.join(map(str, widths))} inputs of {len(uneven)} "
                f"layers (first {uneven[0].name}); these sizes divide every layer: {works}."
            )
        return None

    def tensors(self, name: str, weight: QTensor) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name."""
        bits, half = weight.format.grid.bits, 1 << (weight.format.grid.bits - 1)
        signed = (weight.codes.to(torch.int16) - half).to(torch.int8)
        out = {
            f"{name}.weight_packed": pack_to_int32(signed, bits),
            f"{name}.weight_scale": weight.scale.contiguous(),
            f"{name}.weight_shape": torch.tensor(weight.shape),
        }
        if weight.zero is not None:
            out[f"{name}.weight_zero_point"] = pack_to_int32(weight.zero.contiguous(), bits, packed_dim=0)
        return out

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`, in keys that every reader of the format has long known.

        linears  names of all nn.Linear modules of the model; those that the plan leaves alone are listed as ignored
        """
        fmt = next(iter(plan.layers.values())).format
        weights: dict[str, Any] = {
            "num_bits": fmt.grid.bits,
            "type": "int",
            "symmetric": fmt.symmetric,
            "strategy": "group" if fmt.block[1] else "channel",
            "dynamic": False,
        }
        if fmt.block[1]:
            weights["group_size"] = fmt.block[1]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": [name for name in linears if name not in plan.layers],
        }

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, QTensor]:
        """Return the quantized layers by name, from a `quantization_config` and all tensors of a checkpoint.

        Raises ModelError for another format, and for tensors that are missing or do not fit together.
        """
        if config.get("quant_method") != "compressed-tensors" or config.get("format") != "pack-quantized":
            found = f"{config.get('quant_method')} / {config.get('format')}"
            raise ModelError(
                370, f"the checkpoint is in {found}; quantforge reads compressed-tensors / pack-quantized."
            )
        fmt = _read_scheme(config.get("config_groups"))
        layers = {}
        for key in tensors:
            name, _, part = key.rpartition(".")
            if part == "weight_packed":
                layers[name] = _unpack(name, fmt, {p: tensors.get(f"{name}.{p}") for p in _PARTS})
        return layers


def _read_scheme(groups: object) -> Format:
    """Return the format that the config groups describe; the dtype of scales is known from the tensors only."""
    if not isinstance(groups, dict) or len(groups) != 1:
        count = len(groups) if isinstance(groups, dict) else "no"
        raise ModelError(371, f"the checkpoint has {count} config groups; quantforge reads one.")
    group = next(iter(groups.values()))
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
