"""Statistics of a layer's input, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

_TILES = 8


class Hessian:
    """The second moment of a layer's input, H = (2 / N) Σ x xᵀ over N tokens (GPTQ, arXiv:2210.17323, section 2).

    Each batch is multiplied in float32, the upper triangle only (eight tiles of columns: 9/16 of the arithmetic), and
    the batches are summed in float64, which makes the sum independent of their order to float32 accuracy.

    skipped  tokens left out because their input was not finite
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0
        self.skipped = 0

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` [..., in]."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        finite = x.isfinite().all(1) if not x.sum().isfinite() else None
        if finite is not None:
            self.skipped += int((~finite).sum())
            x = x[finite]
        width = x.shape[1]
        step = max(-(-width // _TILES), 1)
        for start in range(0, width, step):
            self.total[start : start + step, start:] += x[:, start : start + step].T @ x[:, start:]
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return H [in, in], symmetric, float32; zeros when no token was seen."""
        upper = torch.triu(self.total)
        full = upper + torch.triu(upper, 1).T
        return (full * (2 / max(self.tokens, 1))).float()
