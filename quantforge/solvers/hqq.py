"""Half-quadratic quantization: zero points fitted to the weights alone, by a norm that forgives outliers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.numerics import ranges
from quantforge.numerics.blocks import tiles
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import fit, quantize
from quantforge.numerics.ranges import Range
from quantforge.registry import register


@register("solver", "hqq")
@dataclass(frozen=True)
class HQQ:
    """Half-quadratic quantization (Badri and Shaji, Mobius Labs, 2023); needs no data and real zero points.

    Minimises over the zero point of each block the sum of |error|^p, p < 1, by splitting the error into a sparse part,
    which a shrinkage step finds, and the rest, whose mean the zero point takes up. The best zero points met are kept,
    so that the p-norm never exceeds that of rounding.

    norm        p, above 0 and at most 1
    beta        how strongly the two parts are tied at first
    kappa       by what beta grows in each step
    iterations  steps at most
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20

    needs = ()
    extends_format = False
    takes_ranges = False
    by_row = True

    def __post_init__(self) -> None:
        if not 0 < self.norm <= 1:
            raise ValueError(f"norm must lie above 0 and be at most 1, not {self.norm}; 0.7 is usual")
        if not (self.beta > 0 and self.kappa >= 1):
            raise ValueError(f"beta must be positive and kappa at least 1, not {self.beta} and {self.kappa}")
        if self.iterations < 0:
            raise ValueError(f"iterations must be at least 0, not {self.iterations}")

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why `fmt` does not do; None if it has integer codes, and zero points in no format of their own."""
        if not isinstance(fmt.grid, IntGrid) or fmt.symmetric:
            return f"HQQ moves zero points, which {fmt} lacks; int3-g64-asym-fp16-zero-fp16 has them."
        if isinstance(fmt.zero, Format) or isinstance(fmt.scale, Format):
            return f"HQQ moves zero points, which {fmt} quantizes anew; int3-g64-asym-fp16-zero-fp16 keeps them."
        return None

    def solve(self, problem: Problem) -> QWeight:
        """Choose zero points and codes for `problem.weight` [out, in]."""
        weight, fmt = problem.weight, problem.format
        blocks = tiles(weight, fmt.block)
        valid = tiles(torch.ones_like(weight), fmt.block, fill=0.0)
        # from an integer zero point too: weights that are zero then have no error, which a norm below 1 rewards
        starts = [fit(weight, fmt), fit(weight, replace(fmt, zero=None))]
        (one, norms), (other, others) = (self._descend(blocks, start, fmt, valid) for start in starts)
        better = others < norms
        best = Range(torch.where(better, other.scale, one.scale), torch.where(better, other.zero, one.zero))
        return QWeight(quantize(weight, best, fmt), {})

    def _descend(self, blocks: Tensor, start: Range, fmt: Format, valid: Tensor) -> tuple[Range, Tensor]:
        """Return the best range met on the way from `start`, and its norms [row blocks, column blocks]."""
        best, least = start, self._norms(blocks, start, fmt, valid)
        current, beta = start, self.beta
        for _ in range(self.iterations):
            codes = self._codes(blocks, current, fmt)
            error = blocks - (codes - current.zero[..., None]) * current.scale[..., None]
            sparse = _shrink(error, beta, self.norm)
            wanted = (codes - (blocks - sparse) / current.scale[..., None]) * valid
            zero = wanted.sum(-1) / valid.sum(-1)
            current = replace(current, zero=_kept(zero, fmt))
            norms = self._norms(blocks, current, fmt, valid)
            better = norms < least
            least = torch.where(better, norms, least)
            best = replace(best, zero=torch.where(better, current.zero, best.zero))
            beta *= self.kappa
        return best, least

    def _codes(self, blocks: Tensor, r: Range, fmt: Format) -> Tensor:
        return fmt.grid.round(blocks / r.scale[..., None] + r.zero[..., None])

    def _norms(self, blocks: Tensor, r: Range, fmt: Format, valid: Tensor) -> Tensor:
        """Return Σ |error|^p of each block."""
        error = blocks - (self._codes(blocks, r, fmt) - r.zero[..., None]) * r.scale[..., None]
        return (error.abs().pow_(self.norm) * valid).sum(-1)


def _kept(zero: Tensor, fmt: Format) -> Tensor:
    """Round zero points to what `fmt` stores: integers of the grid, or real numbers in its dtype."""
    if fmt.zero is None:
        return zero.round().clamp(fmt.grid.low, fmt.grid.high)
    return ranges.real_zero(zero, fmt)


def _shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """Return the generalized soft threshold sign(x) · max(|x| − |x|^(p−1) / β, 0), which is 0 at 0."""
    size = x.abs()
    kept = (size - size.clamp(min=1e-12).pow(p - 1) / beta).clamp_(min=0)
    return x.sign() * kept
