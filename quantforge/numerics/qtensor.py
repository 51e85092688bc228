"""A matrix held as codes, and the arithmetic between it and floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.numerics.blocks import counts, spread
from quantforge.numerics.formats import Format
from quantforge.numerics.ranges import Range


@dataclass(frozen=True)
class QTensor:
    """A matrix [rows, cols] held as codes: x ≈ scale · (grid[code] − zero).

    codes  [rows, cols] uint8, indices into `format.grid.values`
    scale  [row blocks, column blocks], in the dtype `format.scale`, > 0 and finite
    zero   the same shape, int8 values of the grid; None when the format is symmetric
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, cols)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""
        return self.format.nbits(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return (value − zero) · scale computed in `dtype` (default: that of the scales), as every loader does."""
        dtype = dtype or self.scale.dtype
        value = self.format.grid.decode(self.codes).to(dtype)
        if self.zero is not None:
            value -= spread(self.zero, self.shape, self.format.block).to(dtype)
        return value.mul_(spread(self.scale, self.shape, self.format.block).to(dtype))

    def rows(self, start: int, stop: int) -> QTensor:
        """Return rows `start` to `stop`; the format's blocks must not reach across rows."""
        if self.format.block[0] != 1:
            raise ValueError(f"{self.format} shares scales between rows, which cannot be cut apart")
        zero = None if self.zero is None else self.zero[start:stop]
        return QTensor(self.format, self.codes[start:stop], self.scale[start:stop], zero)


def from_values(value: Tensor, r: Range, fmt: Format) -> QTensor:
    """Store `value` [rows, cols], already on the grid (integers for an integer grid), under the range `r`."""
    zero = None if fmt.symmetric else r.zero.to(torch.int8)
    return QTensor(fmt, fmt.grid.encode(value), r.scale.to(fmt.scale), zero)


def quantize(x: Tensor, r: Range, fmt: Format) -> QTensor:
    """Round `x` [rows, cols] to the nearest value that `fmt` can store under the range `r`."""
    shape = (x.shape[0], x.shape[1])
    if r.scale.shape != counts(shape, fmt.block):
        raise ValueError(f"a range of shape {tuple(r.scale.shape)} does not fit {shape} in blocks of {fmt.block}")
    scale, zero = spread(r.scale, shape, fmt.block), spread(r.zero, shape, fmt.block)
    return from_values(x / scale + zero, r, fmt)
