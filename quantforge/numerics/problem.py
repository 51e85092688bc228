"""One layer to compress, and the one loss by which every result is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.numerics.formats import Format
from quantforge.numerics.inputs import Inputs, QInput
from quantforge.numerics.products import linear
from quantforge.numerics.qtensor import QTensor
from quantforge.numerics.ranges import Range
from quantforge.numerics.residuals import LowRank, Residual, Sparse

WIDE = 4096  # inputs from which on the symmetry of a Hessian saves more than cutting it up costs
TILES = 8  # that it is cut into along each side: 9/16 of the arithmetic


@dataclass(frozen=True)
class Drift:
    """How the inputs of a layer differ from what the float model feeds it (GPTAQ, arXiv:2504.02692).

    cross          [in, in] float32: (2 / N) Σ (x̃ − x) xᵀ over the calibration tokens, x̃ the float model's input
    held_cross     the same over those of them that are to judge a fit to the others
    held_hessian   [in, in] float32: (2 / N) Σ x xᵀ over the same
    held_share     the held tokens' share of all
    """

    cross: Tensor
    held_cross: Tensor
    held_hessian: Tensor
    held_share: float


@dataclass(frozen=True)
class Problem:
    """One matrix to compress; layers that read the same input may be stacked along the rows.

    name       what errors and reports call it
    weight     [out, in] float32; solvers leave it as it is
    format     how it is to be stored
    hessian    [in, in] float32, symmetric: (2 / N) Σ x xᵀ over the N calibration tokens; None if none were collected
    magnitude  [in] float32: mean |x| over the calibration tokens; None if it was not collected
    drift      None if it was not collected
    range      the range to round under, where it was trained; None leaves it to the solver
    extremes   ([in], [in]) float32: the smallest and the largest value of each input channel, or zero
    samples    [tokens, in] float32: some inputs as they are
    inputs     how the layer rounds its inputs when it is called; None if it does not
    """

    name: str
    weight: Tensor
    format: Format
    hessian: Tensor | None = None
    magnitude: Tensor | None = None
    drift: Drift | None = None
    range: Range | None = None
    extremes: tuple[Tensor, Tensor] | None = None
    samples: Tensor | None = None
    inputs: Inputs | None = None

    def row_losses(self, approx: Tensor) -> Tensor:
        """Return the diagonal of (W − Ŵ) H (W − Ŵ)ᵀ → [out]; without a Hessian, H is the identity."""
        return self._energies(self.weight - approx)

    def row_energies(self) -> Tensor:
        """Return the diagonal of W H Wᵀ → [out], the loss of giving nothing for the weight."""
        return self._energies(self.weight)

    def _energies(self, x: Tensor) -> Tensor:
        """Return the diagonal of x H xᵀ for `x` [out, in].

        Of a large H only the tiles on and above the diagonal are multiplied, those above for both halves.
        """
        if self.hessian is None:
            return x.square().sum(1)
        width = x.shape[1]
        if width < WIDE:
            return linear(x, self.hessian).mul_(x).sum(1)
        total, step = torch.zeros_like(x[:, 0]), -(-width // TILES)
        for start in range(0, width, step):
            stop = start + step
            tile, part = self.hessian[start:stop], x[:, start:stop].contiguous()
            weighted = linear(part, tile[:, start:stop].contiguous())
            if stop < width:
                weighted += linear(x[:, stop:].contiguous(), tile[:, stop:].contiguous()).mul_(2)
            total += weighted.mul_(part).sum(1)
        return total

    def loss(self, approx: Tensor) -> float:
        """Return tr((W − Ŵ) H (W − Ŵ)ᵀ): twice the squared output error, a token and summed over outputs."""
        return float(self.row_losses(approx).double().sum())


@dataclass(frozen=True)
class QWeight:
    """What a solver returns: the stored matrix, and what happened on the way.

    base       the codes
    notes      facts for the report, such as the damping that was used; plain JSON values
    residuals  what is kept beside the codes, put on in this order
    inputs     how the layer rounds its inputs when it is called; None: not at all
    """

    base: QTensor
    notes: dict[str, Any]
    residuals: tuple[Residual, ...] = ()
    inputs: QInput | None = None

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""
        return self.base.nbits + sum(r.nbits for r in self.residuals)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix that the layer computes with, [out, in]."""
        dense = self.base.dequantize(dtype)
        for residual in self.residuals:
            dense = residual.onto(dense)
        return dense

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in] times the matrix, part by part, as a kernel would compute it → [tokens, out]."""
        base = self.base.dequantize(x.dtype)
        out = linear(x, base)
        for residual in self.residuals:
            if isinstance(residual, LowRank):
                a, b = residual.factors()
                out += x @ b.T.to(x.dtype) @ a.T.to(x.dtype)
            elif isinstance(residual, Sparse):
                out += residual.product(x, base)
            else:
                out += x @ (residual.onto(base) - base).T
            base = residual.onto(base)
        return out

    def rows(self, start: int, stop: int) -> QWeight:
        """Return what belongs to rows `start` to `stop`."""
        residuals = tuple(r.rows(start, stop) for r in self.residuals)
        return QWeight(self.base.rows(start, stop), self.notes, residuals, self.inputs)
