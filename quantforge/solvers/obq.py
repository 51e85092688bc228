"""The line that GPTQ comes from: optimal brain damage, optimal brain surgeon, optimal brain quantization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.numerics import ranges
from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import fit, from_values, quantize
from quantforge.registry import register
from quantforge.solvers.gptq import refuse_blocks
from quantforge.solvers.rows import choose_rows
from quantforge.solvers.sweep import check_damping, inverse_factor

LARGEST = 1024  # inputs: the work grows with their cube, for every row


def obd_saliency(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return ½ h_jj w_j² for weight [out, in]: what removing each weight costs if no other may answer for it.

    Optimal brain damage (LeCun, Denker and Solla, NeurIPS 1989). hessian  [in, in], of a row's squared error.
    """
    return 0.5 * hessian.diagonal() * weight.square()


def obs_saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    """Return w_j² / (2 [H⁻¹]_jj) for weight [out, in]: what removing each weight costs once the others have answered.

    Optimal brain surgeon (Hassibi and Stork, NeurIPS 1992). inverse  [in, in], H⁻¹.
    """
    return weight.square() / (2 * inverse.diagonal())


def obs_update(weight: Tensor, inverse: Tensor, column: int, value: Tensor | float = 0.0) -> Tensor:
    """Set one column of weight [out, in] to `value`, and let all others answer as well as they can → [out, in]."""
    step = (weight[:, column] - value) / inverse[column, column]
    return weight - step[:, None] * inverse[column]


@register("solver", "obq")
@dataclass(frozen=True)
class OBQ:
    """Optimal brain quantization (Frantar, Singh and Alistarh, NeurIPS 2022, arXiv:2208.11580), for small layers.

    Each row takes its own order: always the weight next whose rounding costs least, once the others have answered for
    it; but at once the one that lies farthest outside its range. In the order of the columns the result is GPTQ's. A
    row that comes out worse than plain rounding takes the rounded codes.

    The paper's order leaves the heaviest inputs to the end, when few weights are left to answer for them. Where some
    inputs are far heavier than others GPTQ, with act_order, loses less.

    damp_percent  what is added to the Hessian's diagonal, as a share of it
    damping       "relative": a share of each column's own entry; "mean": of the mean over columns
    greedy        choose the order; False takes the columns as they come, which is GPTQ
    range         how ranges are found: minmax, percentile, mse, or hessian (squared error weighted by diag(H))
    """

    damp_percent: float = 0.15
    damping: str = "relative"
    greedy: bool = True
    range: str = "minmax"

    needs = ("hessian",)
    extends_format = False
    takes_ranges = True
    by_row = True

    def __post_init__(self) -> None:
        ranges.rule(self.range)
        check_damping(self.damp_percent, self.damping)

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why a layer is too large or its format unfit; None if it can be solved."""
        if shape[1] > LARGEST:
            return f"OBQ is for layers of at most {LARGEST} inputs, and this has {shape[1]}; gptq is for large ones."
        if fmt.row_unit != 1:
            return f"OBQ solves each row alone, and {fmt} shares scales between rows; gptq takes it."
        return refuse_blocks(shape, fmt)

    def solve(self, problem: Problem) -> QWeight:
        """Choose codes for `problem.weight` [out, in] by `problem.hessian` [in, in], which must be there."""
        weight, hessian, fmt = problem.weight, problem.hessian, problem.format
        if hessian is None:
            raise ValueError(f"{problem.name}: OBQ needs a Hessian, and none was collected")
        factor = inverse_factor(hessian.double(), self.damp_percent, relative=self.damping == "relative")
        inverse = factor.u.T @ factor.u
        r = problem.range or fit(
            weight, fmt, self.range, torch.nan_to_num(hessian.diagonal(), nan=0.0, posinf=0.0).clamp(min=0)
        )
        shape = (weight.shape[0], weight.shape[1])
        scale, zero = (spread(part, shape, fmt.block).double().expand(shape) for part in (r.scale, r.zero))
        rows = [self._row(weight[i].double(), inverse, scale[i], zero[i], fmt) for i in range(shape[0])]
        solved = from_values(torch.stack(rows).to(weight.dtype), r, fmt)
        rounded = quantize(weight, r, fmt)
        plain = quantize(weight, fit(weight, fmt), fmt)
        usable = problem if bool(hessian.isfinite().all()) else Problem(problem.name, weight, fmt)
        losses = torch.stack([usable.row_losses(q.dequantize(torch.float32)) for q in (solved, rounded, plain)])
        best = losses.argmin(0)
        out = choose_rows((best == 1)[:, None], rounded, choose_rows((best == 2)[:, None], plain, solved))
        notes = {"damp": factor.damp, "rung": factor.rung, "rows_rounded": int((best > 0).sum())}
        return QWeight(out, notes)

    def _row(self, w: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
        """Return the grid values [in] of one row `w` [in]."""
        w, inverse = w.clone(), inverse.clone()
        left = torch.ones_like(w, dtype=torch.bool)
        values = torch.empty_like(w)
        for step in range(len(w)):
            rounded = fmt.grid.round(w / scale + zero)
            error = w - (rounded - zero) * scale
            j = self._next(error, inverse.diagonal(), left, scale, fmt) if self.greedy else step
            values[j] = rounded[j]
            pivot = inverse[j, j]
            w -= error[j] / pivot * inverse[j] * left
            inverse -= torch.outer(inverse[:, j], inverse[j]) / pivot
            left[j] = False
        return values

    def _next(self, error: Tensor, diagonal: Tensor, left: Tensor, scale: Tensor, fmt: Format) -> int:
        """Return the column to round next among those `left`."""
        outside = left & (error.abs() > scale / 2 * (1 + 1e-9)) if isinstance(fmt.grid, IntGrid) else left & False
        if bool(outside.any()):
            return int(torch.where(outside, error.abs(), -1.0).argmax())
        cost = error.square() / diagonal.clamp(min=1e-300)
        return int(torch.where(left, cost, torch.inf).argmin())
