"""One layer to compress, and the one loss by which every result is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.numerics.formats import Format
from quantforge.numerics.qtensor import QTensor


@dataclass(frozen=True)
class Problem:
    """One matrix to compress; layers that read the same input may be stacked along the rows.

    name     what errors and reports call it
    weight   [out, in] float32; solvers leave it as it is
    format   how it is to be stored
    hessian  [in, in] float32, symmetric: (2 / N) Σ x xᵀ over the N calibration tokens; None if none were collected
    """

    name: str
    weight: Tensor
    format: Format
    hessian: Tensor | None = None

    def row_losses(self, approx: Tensor) -> Tensor:
        """Return the diagonal of (W − Ŵ) H (W − Ŵ)ᵀ → [out]; without a Hessian, H is the identity."""
        error = self.weight - approx
        weighted = error if self.hessian is None else error @ self.hessian
        return (weighted * error).sum(1)

    def loss(self, approx: Tensor) -> float:
        """Return tr((W − Ŵ) H (W − Ŵ)ᵀ): twice the squared output error, a token and summed over outputs."""
        return float(self.row_losses(approx).double().sum())


@dataclass(frozen=True)
class QWeight:
    """What a solver returns: the stored matrix, and what happened on the way.

    base   the codes
    notes  facts for the report, such as the damping that was used; plain JSON values
    """

    base: QTensor
    notes: dict[str, Any]

    def dequantize(self) -> Tensor:
        """Return the float32 matrix that the layer computes with, [out, in]."""
        return self.base.dequantize(torch.float32)
