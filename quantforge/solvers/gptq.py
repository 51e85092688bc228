"""GPTQ: second-order rounding that corrects the columns still to come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantforge.numerics import ranges
from quantforge.numerics.blocks import Flat, extents, spread, within_rows
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import QTensor, fit, from_values
from quantforge.numerics.ranges import Range
from quantforge.registry import register
from quantforge.solvers.rows import keep_better_rows
from quantforge.solvers.sweep import check_damping, inverse_factor, sweep


@register("solver", "gptq")
@dataclass(frozen=True)
class GPTQ:
    """Second-order rounding (Frantar et al., ICLR 2023, arXiv:2210.17323).

    Ranges are fitted to the float weights before the sweep, so that columns may be taken in any order and the stored
    format needs no index of groups. A row that came out no better than plain rounding, by min-max or by the chosen
    ranges, takes the rounded codes: rows are independent, so the result never loses to rounding on the layer's loss.

    damp_percent  what is added to the Hessian's diagonal, as a share of it (the paper: 0.01 of the mean)
    damping       "relative": that share of each column's own entry; "mean": of the mean over columns, as in the paper.
                  Where a few inputs are huge, the mean drowns the others
    act_order     take columns in the order of falling diag(H), the heaviest inputs first
    block_size    columns after which the rest of the matrix is updated; changes speed, not codes
    range         how ranges are found: minmax, percentile, mse, or hessian (squared error weighted by 1 / U_jj², what
                  an error in a column costs once the later columns have made up for it)
    """

    damp_percent: float = 0.15
    damping: str = "relative"
    act_order: bool = True
    block_size: int = 128
    range: str = "hessian"

    needs: ClassVar[tuple[str, ...]] = ("hessian",)
    extends_format = False
    takes_ranges = True
    by_row = True

    def __post_init__(self) -> None:
        ranges.rule(self.range)
        check_damping(self.damp_percent, self.damping)
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}; 128 is usual")

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why the columns of a layer cannot be taken one by one in `fmt`; None if they can."""
        return refuse_blocks(shape, fmt)

    def solve(self, problem: Problem) -> QWeight:
        """Choose codes for `problem.weight` [out, in] by `problem.hessian` [in, in], which must be there."""
        weight, hessian, fmt = problem.weight, problem.hessian, problem.format
        if hessian is None:
            raise ValueError(f"{problem.name}: GPTQ needs a Hessian, and none was collected")
        diagonal = torch.nan_to_num(hessian.diagonal(), nan=0.0, posinf=0.0).clamp(min=0)
        order = diagonal.argsort(descending=True, stable=True) if self.act_order else None
        factor = inverse_factor(hessian, self.damp_percent, order, relative=self.damping == "relative")
        cost = torch.empty_like(diagonal)
        cost[slice(None) if order is None else order] = factor.u.diagonal() ** -2
        chosen = problem.range or fit(weight, fmt, self.range, cost)
        solved = _round_in_order(weight, chosen, fmt, factor.u, order, self.block_size)
        notes = {"damp": factor.damp, "rung": factor.rung, "dead_columns": int(factor.dead.sum())}
        del factor  # what judges the rows needs as much memory
        usable = problem if bool(hessian.isfinite().all()) else Problem(problem.name, weight, fmt)
        best, kept = keep_better_rows(usable, solved, [chosen, fit(weight, fmt)])
        return QWeight(best, {**notes, "rows_rounded": kept})


def refuse_blocks(shape: tuple[int, int], fmt: Format) -> str | None:
    """Return why a sweep over columns cannot be run in `fmt`: flat blocks that run across the ends of rows."""
    if within_rows(shape, fmt.block) is None:
        assert isinstance(fmt.block, Flat)
        return f"blocks of {fmt.block.size} do not divide its {shape[1]} inputs, so no column can be solved alone."
    return None


def _round_in_order(weight: Tensor, r: Range, fmt: Format, u: Tensor, order: Tensor | None, block_size: int) -> QTensor:
    """Sweep over the columns of `weight` [out, in] in `order`, rounding under the range `r`; return the codes."""
    shape = (weight.shape[0], weight.shape[1])
    columns = extents(shape, fmt.block)[1]
    order = torch.arange(shape[1], device=weight.device) if order is None else order
    block_of = (order // columns).tolist()
    rows = (extents(shape, fmt.block)[0], 1)
    scale = [spread(s[:, None], (shape[0], 1), rows)[:, 0].contiguous() for s in r.scale.to(u.dtype).unbind(1)]
    zero = [spread(z[:, None], (shape[0], 1), rows)[:, 0].contiguous() for z in r.zero.to(u.dtype).unbind(1)]
    wt = weight.T[order].to(u.dtype)
    values = torch.empty_like(wt)
    low, high = fmt.grid.low, fmt.grid.high
    integer = isinstance(fmt.grid, IntGrid)

    def rounded(j: int, column: Tensor) -> Tensor:
        s, z = scale[block_of[j]], zero[block_of[j]]
        exact = torch.div(column, s, out=values[j]).add_(z)
        value = exact.round_().clamp_(low, high) if integer else exact.copy_(fmt.grid.round(exact))
        stored: Tensor = (value - z).mul_(s)
        return stored

    sweep(wt, u, rounded, block_size)
    del wt
    natural = torch.empty_like(values)
    natural[order] = values
    return from_values(natural.T, r, fmt)
