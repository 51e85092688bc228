"""Grids: which values one code can mean, before any scale.

A code is an index into the ascending `values`, so it is never negative and packs as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Any ascending table of values, at most 256 of them; encoding takes the nearest.

    A tie between two values goes to the lower one.
    """

    name: str
    values: tuple[float, ...]

    @cached_property
    def bits(self) -> int:
        """Bits of one code."""
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def low(self) -> float:
        """Return the smallest value."""
        return self.values[0]

    @property
    def high(self) -> float:
        """Return the largest value."""
        return self.values[-1]

    def encode(self, x: Tensor) -> Tensor:
        """Return the uint8 codes of the values nearest to `x`, of any shape."""
        table = torch.tensor(self.values, dtype=torch.float64, device=x.device)
        middles = (table[1:] + table[:-1]) / 2
        return torch.bucketize(x.double(), middles).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of `codes`."""
        return torch.tensor(self.values, dtype=torch.float32, device=codes.device)[codes.long()]


@dataclass(frozen=True)
class IntGrid(Grid):
    """The integers −2^(bits−1) … 2^(bits−1)−1; encoding rounds half to even and clamps."""

    def encode(self, x: Tensor) -> Tensor:
        """Return round(x) clamped to the grid, as uint8 codes."""
        return (x.round().clamp_(self.low, self.high) - self.low).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the integers that `codes` mean, as float32."""
        return codes.float() + self.low


def int_grid(bits: int) -> IntGrid:
    """Return the signed integers of 1 to 8 `bits`; ValueError otherwise."""
    if bits not in range(1, 9):
        raise ValueError(f"integer grids have 1 to 8 bits, not {bits}")
    half = 1 << (bits - 1)
    return IntGrid(f"int{bits}", tuple(float(v) for v in range(-half, half)))
