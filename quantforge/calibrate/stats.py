"""Statistics of a layer's input, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantforge.numerics.problem import Drift
from quantforge.numerics.products import linear

_TILES = 8
SAMPLED = 16  # tokens that are kept of each batch, where samples are wanted

Place = Callable[[int], str]  # tells where a token stands, by its number among those of its batch: "window 3"


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
        xt = x.T.contiguous()
        for start in range(0, width, step):
            self.total[start : start + step, start:] += linear(xt[start : start + step], xt[start:])
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return H [in, in], symmetric, float32; zeros when no token was seen."""
        width, scale = self.total.shape[0], 2 / max(self.tokens, 1)
        found = torch.empty(width, width, dtype=torch.float32, device=self.total.device)
        step = max(-(-width // _TILES), 1)
        for start in range(0, width, step):  # tile by tile: at a width of 11,008 the sums alone have a gigabyte
            rows = slice(start, start + step)
            found[rows, start:] = (self.total[rows, start:] * scale).float()
            found[start + step :, rows] = found[rows, start + step :].T
            corner = found[rows, rows].triu()
            found[rows, rows] = corner + corner.triu(1).T
        return found


class Cross:
    """(2 / N) Σ (x̃ − x) xᵀ over N tokens: how the float model's inputs x̃ differ from a layer's own, x."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor, float_x: Tensor) -> None:
        """Add the tokens of `x` [..., in] and `float_x`, of the same shape."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        difference = float_x.detach().reshape(x.shape).float() - x
        finite = difference.isfinite().all(1) & x.isfinite().all(1)
        if not bool(finite.all()):
            x, difference = x[finite], difference[finite]
        self.total += linear(difference.T.contiguous(), x.T.contiguous())
        self.tokens += x.shape[0]

    def value(self) -> Tensor:
        """Return the mean [in, in], float32."""
        return (self.total * (2 / max(self.tokens, 1))).float()


class Extremes:
    """The smallest and the largest value of each channel."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.low = torch.zeros(width, device=device)
        self.high = torch.zeros(width, device=device)

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` [..., in]; zero counts as seen, and what is not finite does not."""
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(flat):
            return
        low, high = flat.amin(0), flat.amax(0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            flat = torch.nan_to_num(flat, nan=0.0, posinf=0.0, neginf=0.0)
            low, high = flat.amin(0), flat.amax(0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)


def positions(batches: Sequence[Tensor], batch: int, tokens: int) -> Place:
    """Return what tells where tokens of a batch stand, `tokens` of which came to a layer.

    batches  token ids [windows, seq_len] of each
    """
    first = sum(len(ids) for ids in batches[:batch])
    windows, length = batches[batch].shape
    if tokens == windows * length:
        return lambda token: f"window {first + token // length}"
    return lambda token: f"window {first}" if windows == 1 else f"windows {first} to {first + windows - 1}"


class Statistics:
    """All that is collected about one stage's input, batch by batch; tokens whose input is not finite are left out.

    needs    of "hessian", "magnitude", "drift", "extremes", "samples"
    held     numbers of the batches that are held out from what drift is fitted on
    skipped  tokens that were left out
    first    where the first of them stood; "" if there was none
    """

    def __init__(
        self, needs: frozenset[str], width: int, device: torch.device | None = None, held: frozenset[int] = frozenset()
    ) -> None:
        self.needs, self.held = needs, held
        self.tokens, self.skipped, self.first = 0, 0, ""
        # whatever else is wanted, losses are told by it; but what only looks at inputs is to be quick
        only_looks = bool(needs) and needs <= {"extremes", "samples"}
        self.hessian = None if only_looks else Hessian(width, device)
        self.extremes = Extremes(width, device)
        self.samples: list[Tensor] = []
        self.magnitude = torch.zeros(width, dtype=torch.float64, device=device)
        if "drift" in needs:
            self.held_hessian = Hessian(width, device)
            self.cross, self.held_cross = Cross(width, device), Cross(width, device)

    def add(self, batch: int, x: Tensor, float_x: Tensor | None = None, where: Place | None = None) -> None:
        """Add the tokens of `x` [..., in] of one batch.

        float_x  what the float model has there, of the same shape
        where    tells where the tokens of the batch stand; None: only the batch is known
        """
        flat = x.detach().reshape(-1, x.shape[-1]).float()
        usable = None if bool(flat.sum().isfinite()) else flat.isfinite().all(1)  # a sum is bad if any term is
        if usable is not None and not bool(usable.all()):
            if not self.skipped:
                token = int((~usable).nonzero()[0])
                self.first = where(token) if where else f"batch {batch}"
            self.skipped += int((~usable).sum())
            flat = flat[usable]
            float_x = None if float_x is None else float_x.reshape(-1, x.shape[-1])[usable]
        self.tokens += len(flat)
        if self.hessian is not None:
            self.hessian.add(flat)
        if "extremes" in self.needs:
            self.extremes.add(flat)
        if "samples" in self.needs and len(flat):
            # drawn: at even distances, a first token of a window, which is like no other, would come up too often
            drawn = torch.randperm(len(flat), generator=torch.Generator().manual_seed(batch))[:SAMPLED]
            self.samples.append(flat[drawn.to(flat.device)])
        if "magnitude" in self.needs:
            self.magnitude += flat.double().abs().sum(0)
        if float_x is not None:
            self.cross.add(flat, float_x)
            if batch in self.held:
                self.held_hessian.add(flat)
                self.held_cross.add(flat, float_x)

    def let_go(self) -> None:
        """Give back the memory of the sums, which are asked for no more; what was counted stays."""
        self.hessian, self.samples = None, []
        if "drift" in self.needs:
            del self.held_hessian, self.cross, self.held_cross

    def fields(self) -> dict[str, Any]:
        """Return them by the names of the fields of a Problem."""
        found: dict[str, Any] = {} if self.hessian is None else {"hessian": self.hessian.value()}
        if "extremes" in self.needs:
            found["extremes"] = (self.extremes.low, self.extremes.high)
        if "samples" in self.needs and self.samples:
            found["samples"] = torch.cat(self.samples)
        if "magnitude" in self.needs:
            found["magnitude"] = (self.magnitude / max(self.tokens, 1)).float()
        if "drift" in self.needs:
            share = self.held_hessian.tokens / max(self.tokens, 1)
            found["drift"] = Drift(self.cross.value(), self.held_cross.value(), self.held_hessian.value(), share)
        return found

    def facts(self) -> dict[str, Any]:
        """Return what a layer's notes have to say of it: the tokens that were left out, and where the first stood."""
        return {"skipped_tokens": self.skipped, "first_skipped": self.first} if self.skipped else {}
