"""Integers of at most 4 bits in groups: torch's int4 product, which takes its inputs in bfloat16.

A weight is (q − 8) · scale + offset with q from 0 to 15 and scale and offset in bfloat16. So inputs, scales that are
not bfloat16 already, offsets and outputs are rounded to 8 significant bits; sums are float32. Groups are of 32, 64, 128
or 256 inputs: larger ones, and whole rows, are several with one scale; one of 16 is filled up to 32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from quantforge.numerics.blocks import extents, spread
from quantforge.numerics.inputs import QInput
from quantforge.numerics.problem import QWeight
from quantforge.runtime.integers import Groups, groups, input_codes, is_integer, spares, takes_inputs
from quantforge.runtime.kernel import nbytes

NAME = "int4"
SIZES = (256, 128, 64, 32)
HALF = 16  # the group that is filled up to the smallest of those
_TILES = 8  # of CUDA's layout: inputs are taken 128 at a time


def group_of(size: int, width: int) -> int | None:
    """Return the operator's group for groups of `size` in rows of `width`; 16 is filled up to 32; None if none fits."""
    return next((s for s in (*SIZES, HALF) if size % s == 0 and width % s == 0), None)


def meant_for(weight: QWeight) -> bool:
    """Tell whether the operator is for the format of `weight`."""
    return is_integer(weight.base) and weight.base.format.grid.bits <= 4


def refuses(weight: QWeight, device: str) -> str | None:
    """Return why the operator cannot compute with a weight that it is meant for; None if it can."""
    q = weight.base
    if spares(weight):
        return "channels of its inputs stay in float"
    out, width = q.shape
    size = extents(q.shape, q.format.block)[1]
    if group_of(size, width) is None:
        return f"groups of {size} in {width} inputs are no multiples of 32, or of 16"
    unit = 16 if device == "cpu" else 8
    if out % unit:
        return f"{out} outputs are no multiple of {unit}"
    if device == "cuda" and (width % (16 * _TILES) or group_of(size, width) == HALF):
        return f"{width} inputs in groups of {size} are no multiples of {16 * _TILES}, or of 32"
    return None


@dataclass(frozen=True, eq=False)
class Int4:
    """A weight as the int4 product takes it.

    packed  the codes in the layout of the processor or GPU, two a byte
    scales  [groups, out, 2] bfloat16: scale and offset
    group   inputs of a group, as the operator has them
    filled  whether each group of 16 is followed by 16 of zeros
    rounds  how inputs are rounded first, or None
    """

    shape: tuple[int, int]
    packed: Tensor
    scales: Tensor
    group: int
    filled: bool = False
    rounds: QInput | None = None
    operator: str = field(default=NAME, init=False)

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes, scales and offsets."""
        return nbytes((self.packed, self.scales))

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in] times the weight → [tokens, out]."""
        if self.rounds is None:
            return self._raw(x.to(torch.bfloat16)).to(x.dtype)
        if not takes_inputs(self.rounds.inputs):
            return self._raw(self.rounds.round(x).to(torch.bfloat16)).to(x.dtype)
        codes, scale = input_codes(x.float(), self.rounds)  # integers up to 256 are exact in bfloat16
        return self._raw(codes.to(torch.bfloat16)).float().mul_(scale).to(x.dtype)

    def _raw(self, x: Tensor) -> Tensor:
        if self.filled:
            x = F.pad(x.view(len(x), -1, HALF), (0, HALF)).view(len(x), -1)
        ops = torch.ops.aten
        run = ops._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else ops._weight_int4pack_mm
        out: Tensor = run(x, self.packed, self.group, self.scales)
        return out


def pack(weight: QWeight, device: str) -> Int4:
    """Pack a weight that `refuses` takes; residuals beside its codes are left out."""
    parts = groups(weight.base)
    shape = weight.base.shape
    size = group_of(parts.size, shape[1])
    assert size is not None
    codes, scales = parts.codes.add(8), _scales(parts, size, shape[1])
    filled = size == HALF
    if filled:
        codes = F.pad(codes.view(shape[0], -1, HALF), (0, HALF), value=8).view(shape[0], -1)
        size = SIZES[-1]
    return Int4(shape, packed(codes, device), scales.to(device), size, filled, weight.inputs)


def packed(codes: Tensor, device: str) -> Tensor:
    """Return `codes` [out, in], 0 to 15, in the operator's layout."""
    if device == "cpu":
        found: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        return found
    pairs = codes.to(device, torch.uint8)
    found = torch.ops.aten._convert_weight_to_int4pack(pairs[:, ::2] << 4 | pairs[:, 1::2], _TILES)
    return found


def held(weight: QWeight) -> Tensor:
    """Return the float32 weight [out, in] that the operator computes with: scales and offsets are bfloat16 in it."""
    parts = groups(weight.base)
    scale = parts.scale.to(torch.bfloat16).float()
    dense = parts.codes.float() * spread(scale, weight.base.shape, (1, parts.size))
    if parts.offset is not None:
        dense += spread(parts.offset.to(torch.bfloat16).float(), weight.base.shape, (1, parts.size))
    return dense


def _scales(parts: Groups, size: int, width: int) -> Tensor:
    """Return scale and offset of each of the operator's groups [groups, out, 2] in bfloat16."""
    place = torch.arange(0, width, size) // parts.size
    scale = parts.scale.cpu()
    offset = torch.zeros_like(scale) if parts.offset is None else parts.offset.cpu()
    return torch.stack([scale.T[place], offset.T[place]], -1).to(torch.bfloat16)
