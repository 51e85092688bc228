"""What is kept beside the codes: a few weights in float, or a low-rank correction; each counts its own bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantforge.numerics.qtensor import QTensor


class Residual(Protocol):
    """A part of a weight [out, in] beside its codes."""

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""

    def onto(self, approx: Tensor) -> Tensor:
        """Return `approx` [out, in] with this part put on it."""

    def rows(self, start: int, stop: int) -> Residual:
        """Return what belongs to rows `start` to `stop`."""


@dataclass(frozen=True)
class LowRank:
    """Factors A [out, rank] and B [rank, in] whose product is added; kept as codes, or in float.

    Codes are dequantized in the dtype of their scales, so that an adapter in that dtype holds the same numbers.
    """

    a: Tensor | QTensor
    b: Tensor | QTensor

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""
        return sum(x.nbits if isinstance(x, QTensor) else x.numel() * x.dtype.itemsize * 8 for x in (self.a, self.b))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A and B as floats, in the dtype in which they, or their scales, are stored."""
        a, b = (x.dequantize() if isinstance(x, QTensor) else x for x in (self.a, self.b))
        return a, b

    def onto(self, approx: Tensor) -> Tensor:
        """Return `approx` + A B."""
        a, b = self.factors()
        return approx + a.to(approx.dtype) @ b.to(approx.dtype)

    def rows(self, start: int, stop: int) -> LowRank:
        """Return what belongs to rows `start` to `stop`."""
        a = self.a.rows(start, stop) if isinstance(self.a, QTensor) else self.a[start:stop]
        return LowRank(a, self.b)


@dataclass(frozen=True)
class Sparse:
    """Single weights that replace what the codes say, as compressed sparse rows.

    start    [out + 1] int32: the values of row i are those from start[i] to start[i + 1]
    columns  [count] int32, ascending within a row; 16 bits each are counted where the width allows it
    values   [count] in their stored dtype
    width    columns of the matrix
    """

    start: Tensor
    columns: Tensor
    values: Tensor
    width: int

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""
        column = 16 if self.width <= 1 << 16 else 32
        return 32 * self.start.numel() + (column + 8 * self.values.dtype.itemsize) * self.columns.numel()

    def _places(self) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(self.start) - 1, device=self.start.device)
        return row.repeat_interleave((self.start[1:] - self.start[:-1]).long()), self.columns.long()

    def onto(self, approx: Tensor) -> Tensor:
        """Return `approx` with these weights in their places."""
        return approx.index_put(self._places(), self.values.to(approx.dtype))

    def product(self, x: Tensor, base: Tensor) -> Tensor:
        """Return x [tokens, in] times what this replaces in `base` [out, in], as a sparse product → [tokens, out]."""
        places = self._places()
        change = self.values.to(base.dtype) - base[places]
        wide = torch.promote_types(base.dtype, torch.float32)  # sparse products know no half precision
        matrix = torch.sparse_coo_tensor(
            torch.stack(places), change.to(wide), base.shape, check_invariants=False, is_coalesced=True
        )
        out: Tensor = torch.sparse.mm(matrix, x.T.to(wide)).T
        return out.to(x.dtype)

    def rows(self, start: int, stop: int) -> Sparse:
        """Return what belongs to rows `start` to `stop`."""
        first, last = int(self.start[start]), int(self.start[stop])
        return Sparse(
            self.start[start : stop + 1] - first, self.columns[first:last], self.values[first:last], self.width
        )


def sparse(places: Tensor, weight: Tensor, dtype: torch.dtype) -> Sparse:
    """Keep the values of `weight` [out, in] where `places` [out, in] is true, in `dtype`."""
    counts = places.sum(1)
    start = torch.zeros(len(counts) + 1, dtype=torch.int32, device=weight.device)
    start[1:] = counts.cumsum(0)
    return Sparse(start, places.nonzero()[:, 1].int(), weight[places].to(dtype), weight.shape[1])


@dataclass(frozen=True)
class Columns:
    """Whole input columns that replace what the codes say: index [count] int32, values [out, count]."""

    index: Tensor
    values: Tensor

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""
        return 32 * self.index.numel() + 8 * self.values.dtype.itemsize * self.values.numel()

    def onto(self, approx: Tensor) -> Tensor:
        """Return `approx` with these columns in their places."""
        return approx.index_copy(1, self.index.long(), self.values.to(approx.dtype))

    def rows(self, start: int, stop: int) -> Columns:
        """Return what belongs to rows `start` to `stop`."""
        return Columns(self.index, self.values[start:stop])
