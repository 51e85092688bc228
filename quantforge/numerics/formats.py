"""Formats: what may be stored. A grid, the block that shares a scale, and how scale and zero point are kept."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from quantforge.numerics.blocks import Block, counts
from quantforge.numerics.grids import Grid, int_grid

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Format:
    """How a matrix is stored: x ≈ scale · (grid[code] − zero_point), one scale and zero point a block.

    grid       the values a code can mean
    block      (rows, columns) sharing a scale; None is the whole axis
    symmetric  True: no zero point. False: one grid value a block, stored in as many bits as a code
    scale      the dtype in which scales are stored; codes are chosen against the stored value
    """

    grid: Grid
    block: Block
    symmetric: bool = False
    scale: torch.dtype = torch.float32

    def with_scale(self, dtype: torch.dtype) -> Format:
        """Return this format with scales stored in `dtype`."""
        return replace(self, scale=dtype)

    def nbits(self, shape: tuple[int, int]) -> int:
        """Count the bits of a matrix of `shape`: codes, scales and zero points; a container may pad them."""
        down, across = counts(shape, self.block)
        per_block = self.scale.itemsize * 8 + (0 if self.symmetric else self.grid.bits)
        return shape[0] * shape[1] * self.grid.bits + down * across * per_block

    def __str__(self) -> str:
        names = {(None, None): "tensor", (1, None): "channel", (None, 1): "column"}
        where = names.get(self.block) or (
            f"g{self.block[1]}" if self.block[0] == 1 else f"b{self.block[0]}x{self.block[1]}"
        )
        dtype = next(k for k, v in SCALE_DTYPES.items() if v == self.scale)
        return f"{self.grid.name}-{where}-{'sym' if self.symmetric else 'asym'}-{dtype}"


def parse(text: str) -> Format:
    """Read a notation such as `int4-g64-asym` or `int8-channel-sym-bf16`; ValueError if it is none.

    The forms are intB-(gN|channel|token|tensor)[-sym|-asym][-fp32|-bf16|-fp16]; symmetric and fp32 if left out.
    """
    m = re.fullmatch(r"int([1-8])-(?:g([1-9]\d*)|(channel|token|tensor))(?:-(sym|asym))?(?:-(fp32|bf16|fp16))?", text)
    if not m:
        raise ValueError(f"{text!r} is no format; write for example int4-g64-asym, int8-channel-sym or int8-tensor-sym")
    bits, group, whole, kind, dtype = m.groups()
    block: Block = (1, int(group)) if group else (None, None) if whole == "tensor" else (1, None)
    return Format(int_grid(int(bits)), block, kind != "asym" if kind else True, SCALE_DTYPES[dtype or "fp32"])
