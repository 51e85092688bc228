"""SpQR: small groups with quantized scales, and the few weights that would suffer most kept in float."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.numerics import ranges
from quantforge.numerics.blocks import extents, spread, tiles
from quantforge.numerics.formats import Format
from quantforge.numerics.problem import Problem, QWeight
from quantforge.numerics.qtensor import fit, from_values, quantize
from quantforge.numerics.ranges import Range
from quantforge.numerics.residuals import sparse
from quantforge.registry import register
from quantforge.solvers.gptq import refuse_blocks
from quantforge.solvers.sweep import check_damping, inverse_factor, sweep


@register("solver", "spqr")
@dataclass(frozen=True)
class SpQR:
    """Sparse-quantized representation (Dettmers et al., ICLR 2024, arXiv:2306.03078), algorithm 1.

    GPTQ's sweep, in which a weight whose error would cost more than a threshold keeps its value. Ranges are fitted to
    the float weights, without those that leave-one-out marks: weights without which their group would be rounded
    better by more than the threshold. The cost of an error in column j is its square divided by U_jj², and the
    threshold is given as a share of the mean over columns of the weights' variance divided by U_jj².

    outlier_threshold  that share: lower keeps more weights in float; the paper searches 0.1 to 0.45. A share above 1e6
                       keeps none, and the result is GPTQ with the same ranges
    damp_percent       what is added to the Hessian's diagonal, as a share of it
    damping            "relative": a share of each column's own entry; "mean": of the mean over columns
    act_order          take columns in the order of falling diag(H)
    block_size         columns after which the rest of the matrix is updated; changes speed, not codes
    range              how ranges are found: minmax, percentile, mse, or hessian (squared error weighted by 1 / U_jj²)
    """

    outlier_threshold: float = 0.4
    damp_percent: float = 0.15
    damping: str = "relative"
    act_order: bool = True
    block_size: int = 128
    range: str = "hessian"

    needs = ("hessian",)
    extends_format = True
    takes_ranges = False
    by_row = False

    def __post_init__(self) -> None:
        ranges.rule(self.range)
        if not self.outlier_threshold >= 0:
            raise ValueError(
                f"outlier_threshold must be at least 0, not {self.outlier_threshold}; 0.1 to 0.45 is usual"
            )
        check_damping(self.damp_percent, self.damping)
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}; 128 is usual")

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why the columns of a layer cannot be taken one by one in `fmt`; None if they can."""
        return refuse_blocks(shape, fmt)

    def solve(self, problem: Problem) -> QWeight:
        """Choose codes and outliers for `problem.weight` [out, in] by `problem.hessian` [in, in]."""
        weight, hessian, fmt = problem.weight, problem.hessian, problem.format
        if hessian is None:
            raise ValueError(f"{problem.name}: SpQR needs a Hessian, and none was collected")
        diagonal = torch.nan_to_num(hessian.diagonal(), nan=0.0, posinf=0.0).clamp(min=0)
        order = diagonal.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(diagonal))
        order = order.to(weight.device)
        factor = inverse_factor(hessian, self.damp_percent, order, relative=self.damping == "relative")
        cost = torch.empty_like(diagonal)
        cost[order] = factor.u.diagonal().to(cost.dtype) ** -2
        variance = weight.var(0, correction=0) if len(weight) > 1 else weight.var(correction=0).expand_as(cost)
        threshold = self.outlier_threshold * float((variance * cost).double().mean())
        likely = leave_one_out(weight, fmt, cost) > threshold
        chosen = fit(_without(weight, likely, fmt), fmt, self.range, cost)
        solved = self._sweep(weight, chosen, fmt, factor.u, order, threshold)
        rounded = QWeight(quantize(weight, fit(weight, fmt), fmt), {})
        kept = bool(hessian.isfinite().all()) and problem.loss(rounded.dequantize()) < problem.loss(solved.dequantize())
        share = 0.0 if kept or not solved.residuals else len(solved.residuals[0].values) / weight.numel()  # type: ignore[attr-defined]
        notes = {
            "damp": factor.damp,
            "rung": factor.rung,
            "dead_columns": int(factor.dead.sum()),
            "outlier_share": share,
            "rounded": kept,
        }
        best = rounded if kept else solved
        return QWeight(best.base, notes, best.residuals)

    def _sweep(self, weight: Tensor, r: Range, fmt: Format, u: Tensor, order: Tensor, threshold: float) -> QWeight:
        """Sweep over the columns of `weight` in `order`, sparing what would err by more than `threshold`."""
        shape = (weight.shape[0], weight.shape[1])
        columns = extents(shape, fmt.block)[1]
        rows = (extents(shape, fmt.block)[0], 1)
        scale, zero = (
            [spread(s[:, None], (shape[0], 1), rows)[:, 0].contiguous() for s in part.to(u.dtype).unbind(1)]
            for part in (r.scale, r.zero)
        )
        block_of, pivots = (order // columns).tolist(), u.diagonal().tolist()
        wt = weight.T[order].to(u.dtype)
        values, spared = torch.empty_like(wt), torch.zeros_like(wt, dtype=torch.bool)

        def rounded(j: int, column: Tensor) -> Tensor:
            s, z = scale[block_of[j]], zero[block_of[j]]
            values[j] = fmt.grid.round(column / s + z)
            stored = (values[j] - z) * s
            torch.gt(((column - stored) / pivots[j]).square_(), threshold, out=spared[j])
            spared[j] &= column.abs() <= torch.finfo(torch.float16).max
            values[j] = torch.where(spared[j], fmt.grid.round(z), values[j])  # a code that means about 0
            return torch.where(spared[j], column.half().to(column.dtype), stored)

        swept = sweep(wt, u, rounded, self.block_size)
        natural, final, places = torch.empty_like(values), torch.empty_like(values), torch.empty_like(spared)
        natural[order], final[order], places[order] = values, swept, spared
        base = from_values(natural.T, r, fmt)
        if not bool(places.any()):
            return QWeight(base, {})
        return QWeight(base, {}, (sparse(places.T, final.T, torch.float16),))


def leave_one_out(weight: Tensor, fmt: Format, cost: Tensor) -> Tensor:
    """Return, for each weight [out, in], by how much its group's cost falls if the range is fitted without it.

    cost  [in]: what a squared error in a column costs
    The cost of the weight's own error is left out of the second sum, as it would be kept in float (section 4.1).
    """
    shape = (weight.shape[0], weight.shape[1])
    plain = ranges.plain_format(fmt)
    blocks = tiles(weight, fmt.block)
    weights = tiles(cost.expand(shape).contiguous(), fmt.block, fill=0.0)
    real = tiles(torch.ones_like(weight), fmt.block, fill=0.0) > 0
    own = _squares(blocks, plain) * weights
    whole = own.sum(-1, keepdim=True)
    gains = own.clone()  # only without its smallest or its largest weight has a block another range
    for place in (blocks.masked_fill(~real, torch.inf).argmin(-1), blocks.masked_fill(~real, -torch.inf).argmax(-1)):
        gone = torch.zeros_like(real).scatter_(-1, place[..., None], True)
        others = real & ~gone
        mean = (blocks * others).sum(-1, keepdim=True) / others.sum(-1, keepdim=True).clamp(min=1)
        error = _squares(torch.where(others, blocks, mean), plain) * weights * others
        gains = torch.where(gone, whole - error.sum(-1, keepdim=True), gains)
    return _untile(gains, shape, fmt)


def _squares(blocks: Tensor, fmt: Format) -> Tensor:
    """Return the squared errors of rounding blocks [row blocks, column blocks, elements], each under its own range."""
    r = ranges.from_limits(*blocks.aminmax(dim=-1), fmt)
    return (ranges.round_to(blocks, r.scale[..., None], r.zero[..., None], fmt) - blocks).square_()


def _without(weight: Tensor, places: Tensor, fmt: Format) -> Tensor:
    """Replace the weights at `places` by the mean of the others of their block."""
    shape = (weight.shape[0], weight.shape[1])
    blocks, gone = tiles(weight, fmt.block), tiles(places.to(weight.dtype), fmt.block, fill=1.0)
    mean = (blocks * (1 - gone)).sum(-1, keepdim=True) / (1 - gone).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(places, _untile(mean.expand_as(blocks), shape, fmt), weight)


def _untile(blocks: Tensor, shape: tuple[int, int], fmt: Format) -> Tensor:
    """Put blocks [row blocks, column blocks, elements] back into a matrix of `shape`."""
    rows, cols = extents(shape, fmt.block)
    down, across = blocks.shape[:2]
    whole = blocks.reshape(down, across, rows, cols).transpose(1, 2).reshape(down * rows, across * cols)
    return whole[: shape[0], : shape[1]]
