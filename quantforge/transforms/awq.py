"""Activation-aware scaling: input channels that carry much are enlarged before rounding, and what feeds them shrunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.numerics import ranges
from quantforge.numerics.blocks import spread, tiles
from quantforge.numerics.problem import Problem
from quantforge.numerics.qtensor import fit
from quantforge.registry import register


@register("transform", "awq")
@dataclass(frozen=True)
class AWQ:
    """Activation-aware weight quantization (Lin et al., MLSys 2024, arXiv:2306.00978), section 3.2.

    Scales s = a^r with a the mean |x| of each input channel, and s = a^r / w̄^(1−r) with w̄ the mean size of its weights
    relative to their group's largest; r is searched. What is minimised is the layers' own output error, tr(E H Eᵀ) for
    E the error of the weights scaled, rounded and scaled back: the loss of the report, not the error of the module
    around them. No scaling is among the candidates, so that rounding with these scales never loses to rounding
    without. The clipping of section 3.2 is the solver's range rule.

    steps  how many values of r above 0 and up to 1 are tried; the paper has 20 without the second kind of scales
    duo    try the scales that also look at the weights
    range  the range rule that the search rounds with; it should be the solver's, or the scales suit another rounding
    rows   of the weights that the search looks at, drawn; -1 is all. What it finds must then gain on all of them
    """

    steps: int = 10
    duo: bool = True
    range: str = "hessian"
    rows: int = 128

    needs = ("hessian", "magnitude")
    producers = ("norm", "values", "rows")

    def __post_init__(self) -> None:
        ranges.rule(self.range)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}; 20 is usual")
        if self.rows < 1 and self.rows != -1:
            raise ValueError(f"rows must be at least 1, or -1 for all, not {self.rows}")

    def scales(self, problem: Problem, tie: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the scales [in] with the least loss, with geometric mean of largest and smallest 1."""
        assert problem.hessian is not None
        assert problem.magnitude is not None
        one = torch.ones_like(problem.magnitude)
        magnitude = tie(problem.magnitude)
        if not bool((magnitude > 0).any()):
            return one
        magnitude = magnitude / magnitude.mean()  # what is measured in other units is scaled alike
        whole, problem = problem, replace(problem, weight=self._sample(problem))
        best, least = one, self._loss(problem, one)
        for candidate in self._candidates(magnitude, tie(_relative_size(problem))):
            loss = self._loss(problem, candidate)
            if loss < least:
                best, least = candidate, loss
        if len(problem.weight) < len(whole.weight) and not self._loss(whole, best) < self._loss(whole, one):
            return one
        return best

    def _sample(self, problem: Problem) -> Tensor:
        """Return `rows` rows of the weight, drawn with a fixed seed; all where blocks reach across rows."""
        weight = problem.weight
        if problem.format.row_unit != 1 or not 0 < self.rows < len(weight):
            return weight
        drawn = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[: self.rows]
        return weight[drawn.sort().values.to(weight.device)]

    def _candidates(self, magnitude: Tensor, size: Tensor) -> list[Tensor]:
        found = []
        for step in range(self.steps + 1):
            r = step / self.steps
            if step:
                found.append(_normal(magnitude.clamp(min=1e-4).pow(r)))
            if self.duo:
                found.append(_normal(magnitude.clamp(min=1e-4).pow(r) / (size.pow(1 - r) + 1e-4)))
        return found

    def _loss(self, problem: Problem, scales: Tensor) -> float:
        scaled = problem.weight * scales
        assert problem.hessian is not None
        importance = problem.hessian.diagonal() / scales.square()  # the inputs shrink as the weights grow
        fmt, shape, losses = problem.format, _shape(scaled), []
        for rule in dict.fromkeys((self.range, "minmax") if self.range == "hessian" else (self.range,)):
            r = fit(scaled, fmt, rule, importance)
            rounded = ranges.round_to(scaled, spread(r.scale, shape, fmt.block), spread(r.zero, shape, fmt.block), fmt)
            found = problem.row_losses(rounded.div_(scales)).double()
            losses.append(found if fmt.row_unit == 1 else found.sum(0, keepdim=True))
        return float(torch.stack(losses).amin(0).sum())  # as rounding by that rule keeps the better rows


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _normal(scales: Tensor) -> Tensor:
    """Scale so that the largest times the smallest is 1."""
    return scales / (scales.max() * scales.min()).sqrt()


def _relative_size(problem: Problem) -> Tensor:
    """Return the mean over rows of |w| relative to the largest of its group, for each input channel [in]."""
    weight, block = problem.weight.abs(), problem.format.block
    top = spread(tiles(weight, block).amax(-1), _shape(weight), block)
    return (weight / top.clamp(min=torch.finfo(top.dtype).tiny)).mean(0)
