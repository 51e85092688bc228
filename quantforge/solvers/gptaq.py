"""GPTAQ: GPTQ whose target is the float model's output on the float model's own inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quantforge.numerics.problem import Drift, Problem, QWeight
from quantforge.registry import register
from quantforge.solvers.gptq import GPTQ

STRENGTHS = (0.0, 0.25, 0.5, 1.0)


@register("solver", "gptaq")
@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """GPTQ with asymmetric calibration (Li et al., ICML 2025, arXiv:2504.02692).

    Earlier layers have already moved the input from x̃ to x, so that W x̃ is to be met by Ŵ x. The unrounded optimum is
    W + W C H⁻¹ with C = Σ (x̃ − x) xᵀ, taken in closed form where the paper adds its part column by column, and GPTQ
    then rounds towards it: minimising over Ŵ the error against W x̃ is the same, up to a constant, as against that
    target. Only a share of the correction generalizes; the share is searched for each group of layers on tokens that
    the fit has not seen. Share 0 is GPTQ. Layer losses are against W, so they come out above GPTQ's.

    strength  the share, from 0 to 1; below 0 it is searched among 0, 0.25, 0.5 and 1

    The other options are GPTQ's: damp_percent, damping, act_order, block_size, range.
    """

    strength: float = -1.0

    needs: ClassVar[tuple[str, ...]] = ("drift", "hessian")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength <= 1:
            raise ValueError(f"strength must be at most 1, or below 0 to be searched, not {self.strength}")

    def solve(self, problem: Problem) -> QWeight:
        """Choose codes for `problem.weight` [out, in] by `problem.hessian` and `problem.drift`."""
        drift, hessian = problem.drift, problem.hessian
        if drift is None or hessian is None or not bool(hessian.diagonal().any()):
            return super().solve(problem)
        strength = self.strength
        if strength < 0 and not drift.held_share:  # nothing to judge by
            strength = 0.0
        if strength < 0:
            fitted = _without(hessian, drift.held_hessian, drift.held_share)
            cross = _without(drift.cross, drift.held_cross, drift.held_share)
            tried = []
            for candidate in STRENGTHS:
                approx = self._solve(problem, fitted, cross, candidate).dequantize()
                tried.append((_loss(problem.weight, approx, drift), candidate))
            strength = min(tried)[1]
        solved = self._solve(problem, hessian, drift.cross, strength)
        return replace(solved, notes={**solved.notes, "strength": strength})

    def _solve(self, problem: Problem, hessian: Tensor, cross: Tensor, strength: float) -> QWeight:
        """Run GPTQ towards the target that makes up for `strength` of the inputs' error."""
        if strength == 0:
            return GPTQ.solve(self, replace(problem, hessian=hessian))
        target = problem.weight + strength * correction(problem.weight, hessian, cross, self.damp_percent)
        return GPTQ.solve(self, replace(problem, weight=target, hessian=hessian))


def correction(weight: Tensor, hessian: Tensor, cross: Tensor, damp_percent: float) -> Tensor:
    """Return W C H⁻¹ [out, in], H damped by a share of each column's own energy; zeros where that cannot be had."""
    damped = hessian.double()
    mean = damped.diagonal().mean()
    damped.diagonal().mul_(1 + damp_percent).add_(1e-4 * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.zeros_like(weight)
    moved = weight.double() @ cross.double()
    found = torch.cholesky_solve(moved.T, lower).T.to(weight.dtype)
    return found if bool(found.isfinite().all()) else torch.zeros_like(weight)


def _without(whole: Tensor, part: Tensor, share: float) -> Tensor:
    """Return the mean over the tokens that are not held out, from that over all and that over the held."""
    return (whole - share * part) / (1 - share)


def _loss(weight: Tensor, approx: Tensor, drift: Drift) -> float:
    """Return Σ (W x̃ − Ŵ x)² over the held-out tokens, up to a constant: tr(Ŵ H Ŵᵀ) − 2 tr(W (C + H) Ŵᵀ)."""
    h, c = drift.held_hessian.double(), drift.held_cross.double()
    w, q = weight.double(), approx.double()
    return float(((q @ h) * q).sum() - 2 * ((w @ (c + h)) * q).sum())
