"""SmoothQuant: what is hard to round in the inputs is moved into the weights, channel by channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.numerics.inputs import settle
from quantforge.numerics.problem import Problem
from quantforge.numerics.products import linear
from quantforge.numerics.qtensor import fit, quantize
from quantforge.registry import register

_LEAST = 1e-5  # of scales and of largest weights, as in the authors' code
ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)


@register("transform", "smoothquant")
@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant (Xiao et al., ICML 2023, arXiv:2211.10438, section 4, equation 4).

    Input channel j of the layers that read it is divided by s_j = max|x_j|^α / max|w_j|^(1−α), and its weights are
    multiplied by it: the larger α, the more of the difficulty moves into the weights. The division is folded into the
    norm before them.

    alpha   between 0 and 1: 0.5 suits OPT and BLOOM, 0.8 to 0.9 Llama and Mistral
    search  choose α for each group of layers: the one with which the layers' outputs, inputs and weights rounded to
            their formats, err least on sampled inputs, layers that share an input as one; alpha then plays no part
    down    smooth the input of the last layer of the MLP too, where the layer before can take it
    """

    alpha: float = 0.8
    search: bool = False
    down: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie between 0 and 1, not {self.alpha}; 0.5 to 0.9 is usual")

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected."""
        return ("extremes", "samples") if self.search else ("extremes",)

    @property
    def producers(self) -> tuple[str, ...]:
        """Return what may take the inverse scales."""
        return ("norm", "rows") if self.down else ("norm",)

    def scales(self, problem: Problem, tie: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the scales [in], by which weights are multiplied; ones where no input was seen."""
        assert problem.extremes is not None
        low, high = problem.extremes
        size = torch.nan_to_num(torch.maximum(low.abs(), high.abs()), nan=0.0, posinf=0.0)
        if not bool((size > 0).any()):
            return torch.ones_like(size)
        if not self.search or problem.samples is None or not len(problem.samples):
            return tie(smooth(size, problem.weight, self.alpha))
        tried = [(self._error(problem, tie(smooth(size, problem.weight, alpha))), alpha) for alpha in ALPHAS]
        return tie(smooth(size, problem.weight, min(tried)[1]))

    def _error(self, problem: Problem, scales: Tensor) -> float:
        """Return Σ (X Wᵀ − Q(X / s) Q(W s)ᵀ)² over the samples."""
        assert problem.samples is not None
        assert problem.extremes is not None
        x, scaled = problem.samples / scales, problem.weight * scales
        rounded = quantize(scaled, fit(scaled, problem.format), problem.format).dequantize(torch.float32)
        if problem.inputs is not None:
            low, high = problem.extremes
            by_tensor = problem.inputs.format.block == (None, None)  # the samples lack what sets its range
            inputs = replace(problem.inputs, static=by_tensor)
            rounds = settle(inputs, low / scales, high / scales, torch.float32)
            x = rounds.round(x)
        return float((linear(problem.samples, problem.weight) - linear(x, rounded)).double().square().sum())


def smooth(size: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return size^α / max|w|^(1−α) [in], at least 1e-5, for the largest |x| of each channel and weight [out, in]."""
    largest = weight.abs().amax(0).clamp(min=_LEAST)
    return (size.clamp(min=_LEAST).pow(alpha) / largest.pow(1 - alpha)).clamp(min=_LEAST)
