"""The column loop that GPTQ and its relatives share, and the triangular factor that drives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_INNER = 16  # columns updated one by one before a small matrix product takes over; speed only


def check_damping(damp_percent: float, damping: str) -> None:
    """Raise ValueError unless these are options that `inverse_factor` knows: a share from 0 to 1, and of what."""
    if not 0 <= damp_percent <= 1:
        raise ValueError(f"damp_percent must lie between 0 and 1, not {damp_percent}; the paper uses 0.01")
    if damping not in ("relative", "mean"):
        raise ValueError(f"damping is relative or mean, not {damping!r}")


@dataclass(frozen=True)
class Factor:
    """U, upper triangular with UᵀU = (H + D)⁻¹ for a diagonal damping D, and how it was obtained.

    u      [in, in] in the dtype in which the Cholesky factorization succeeded
    damp   the share of diag(H) that the damping came to
    rung   "float32", "float64", or "diagonal" when no damping made H factorizable and only its diagonal is used
    dead   [in] bool: columns whose input was always zero
    """

    u: Tensor
    damp: float
    rung: str
    dead: Tensor


def inverse_factor(
    hessian: Tensor, damp_percent: float, order: Tensor | None = None, *, relative: bool = False
) -> Factor:
    """Factor a Hessian [in, in], with its columns taken in `order` [in], climbing a ladder until it succeeds.

    With J the reversal, H = R Rᵀ for R = J chol(J H J) J upper triangular, and U = R⁻¹: one Cholesky and no explicit
    inverse (GPTQ is Babai's nearest plane, arXiv:2507.18553). The damping is damp_percent times the mean of diag(H) on
    every column, as in the paper; or, if `relative`, times each column's own entry. The ladder: the dtype of H,
    float64, then a damping three times as large up to 1, then the diagonal alone.
    """
    size = hessian.shape[0]
    order = torch.arange(size, device=hessian.device) if order is None else order
    diagonal, back = hessian.diagonal()[order], order.flip(0)
    dead = diagonal <= 0
    mean = float(diagonal.double().clamp(min=0).mean())
    dtypes = [hessian.dtype] if hessian.dtype == torch.float64 else [hessian.dtype, torch.float64]
    damp = damp_percent
    added = diagonal.clone() if relative else torch.full_like(diagonal, mean)
    while mean > 0 and torch.isfinite(hessian).all() and damp <= 1:
        for dtype in dtypes:
            # all in place, in the order of columns that LAPACK takes: at a width of 11,008 a copy has half a gigabyte
            h = hessian[back[:, None], back].to(dtype).T
            h.diagonal().add_((damp * added).flip(0))
            h.diagonal()[dead.flip(0)] = mean
            failed = torch.empty((), dtype=torch.int32, device=h.device)
            torch.linalg.cholesky_ex(h, out=(h, failed))
            if not failed:
                upper = h.flip(0, 1)
                del h
                u = torch.eye(size, dtype=dtype, device=upper.device).T
                torch.linalg.solve_triangular(upper, u, upper=True, out=u)
                if torch.isfinite(u).all():
                    return Factor(u.to(hessian.dtype), damp, str(dtype).removeprefix("torch."), dead)
        damp = max(3 * damp, 0.01)
    usable = torch.where((diagonal > 0) & diagonal.isfinite(), diagonal, 1.0)
    return Factor(torch.diag(usable.rsqrt()), damp_percent, "diagonal", dead)


def sweep(
    wt: Tensor,
    u: Tensor,
    rounded: Callable[[int, Tensor], Tensor],
    block_size: int = 128,
) -> Tensor:
    """Round a matrix column by column, moving each column's error onto the columns still to come.

    Greedily minimises ‖(W − Ŵ)X‖² (GPTQ, arXiv:2210.17323, algorithm 1). The error of column j, divided by U_jj, times
    row j of U is taken off the later columns; those of the same inner block at once, the others in matrix products.

    wt          [in, out], the transposed weight, so that a column of W is contiguous; overwritten and returned as Ŵᵀ
    u           [in, in] upper triangular
    rounded     (j, column [out]) → the column as it will be stored, [out]
    block_size  columns after which the rest of the matrix is updated: changes speed, not Ŵ
    """
    size = wt.shape[0]
    pivots = u.diagonal().tolist()
    errors = wt.new_empty(min(block_size, size), wt.shape[1])
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        for inner in range(start, stop, _INNER):
            end = min(inner + _INNER, stop)
            for j in range(inner, end):
                column = rounded(j, wt[j])
                error = torch.sub(wt[j], column, out=errors[j - start]).div_(pivots[j])
                wt[j] = column
                if j + 1 < end:
                    wt[j + 1 : end].addr_(u[j, j + 1 : end], error, alpha=-1)
            if end < stop:
                wt[end:stop].addmm_(u[inner:end, end:stop].T, errors[inner - start : end - start], alpha=-1)
        if stop < size:
            wt[stop:].addmm_(u[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return wt
