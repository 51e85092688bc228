"""Layers of the kinds that break quantizers, and GPTQ and OBQ written plainly in float64 to compare with."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantforge.numerics.formats import parse
from quantforge.numerics.problem import Drift, Problem

INPUTS = ("white", "correlated", "ar", "heavy", "deficient", "dead")
WEIGHTS = ("normal", "outliers", "one-sign", "half-zero")


def inputs(kind: str, tokens: int, width: int, rng: torch.Generator) -> Tensor:
    """Return X [tokens, width] float64 with independent (white), mixed (correlated) or AR(0.9) channels.

    heavy gives the mixed channels scales of a lognormal with σ = 2, deficient a third of the rank, dead some zeros.
    """
    x = torch.randn(tokens, width, generator=rng, dtype=torch.float64)
    if kind == "white":
        return x
    if kind == "ar":
        for j in range(1, width):
            x[:, j] = 0.9 * x[:, j - 1] + 0.19**0.5 * x[:, j]
        return x
    if kind == "deficient":
        rank = max(width // 3, 1)
        return x[:, :rank] @ torch.randn(rank, width, generator=rng, dtype=torch.float64)
    x = x @ (torch.eye(width) + torch.randn(width, width, generator=rng, dtype=torch.float64) * 2 / width**0.5)
    if kind == "heavy":
        x *= (2 * torch.randn(width, generator=rng, dtype=torch.float64)).exp()
    if kind == "dead":
        x[:, torch.rand(width, generator=rng) < 0.3] = 0
    return x


def weights(kind: str, out: int, width: int, rng: torch.Generator) -> Tensor:
    """Return W [out, width] float64: normal, with rare large values, of one sign a row, or with rows of zeros."""
    w = torch.randn(out, width, generator=rng, dtype=torch.float64)
    if kind == "outliers":
        w = w * w.abs() ** 3
    if kind == "one-sign":
        sign = torch.randn(out, 1, generator=rng, dtype=torch.float64).sign()
        w = (w.abs() + 1) * sign
    if kind == "half-zero":
        w[::2] = 0
    return w


def problem(
    fmt: str = "int4-g16-asym",
    out: int = 8,
    width: int = 48,
    seed: int = 0,
    x: str = "correlated",
    w: str = "normal",
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
    drift: float = 0.0,
) -> Problem:
    """Return a layer of `out` × `width` in the format `fmt`, with weight and all statistics in `dtype`.

    drift  how far the float model's inputs are from these, as a share; 0 for none collected
    """
    rng = torch.Generator().manual_seed(seed)
    count = tokens or 4 * width
    sample = inputs(x, count, width, rng)
    # float32 first, so that the same problem can be had in float64 with equal numbers
    weight = weights(w, out, width, rng).float().to(dtype)
    hessian = (sample.T @ sample * (2 / count)).float().to(dtype)
    moved = drifted(sample + drift * sample.roll(1, 1), sample, dtype) if drift else None
    extremes = (sample.amin(0).clamp(max=0).to(dtype), sample.amax(0).clamp(min=0).to(dtype))
    return Problem(
        "layer", weight, parse(fmt), hessian, sample.abs().mean(0).to(dtype), moved, None, extremes, sample.to(dtype)
    )


def drifted(float_inputs: Tensor, x: Tensor, dtype: torch.dtype = torch.float32) -> Drift:
    """Return the statistics of x̃ and x [tokens, width]; every fourth token is held out."""
    moved, held = float_inputs - x, slice(3, None, 4)
    count, kept = len(x), len(x[held])
    parts = (moved.T @ x * (2 / count), moved[held].T @ x[held] * (2 / kept), x[held].T @ x[held] * (2 / kept))
    return Drift(*(part.to(dtype) for part in parts), kept / count)


def damped(h: Tensor, share: float, relative: bool = False) -> Tensor:
    """Return H in float64 with `share` of its diagonal, or of the mean of that, added to it.

    Columns without input get the mean, which keeps them apart from the others.
    """
    h = h.double().clone()
    mean, dead = h.diagonal().mean(), h.diagonal() == 0
    h += share * torch.diag(h.diagonal() if relative else mean.expand(len(h)))
    h.diagonal()[dead] = mean
    return h


def by_falling_diagonal(h: Tensor) -> list[int]:
    """Return the columns of H, the largest diagonal first and ties in natural order."""
    return sorted(range(len(h)), key=lambda j: (-float(h[j, j]), j))


def gptq_by_inverse(
    w: Tensor, h: Tensor, rounded: Callable[[int, Tensor], Tensor], order: list[int] | None = None
) -> Tensor:
    """Quantize W [out, in] a column at a time, as equations 2 and 3 of the GPTQ paper say, → Ŵ.

    The inverse of H over the columns that remain is computed anew for each. `rounded` gets the natural column number.
    """
    w, out = w.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    remaining = list(order or range(w.shape[1]))
    while remaining:
        j = remaining[0]
        inverse = torch.linalg.inv(h[remaining][:, remaining])
        out[:, j] = rounded(j, w[:, j])
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, remaining] -= error[:, None] * inverse[0]
        remaining = remaining[1:]
    return out


def obq_in_order(
    w: Tensor, h: Tensor, rounded: Callable[[int, Tensor], Tensor], order: list[int] | None = None
) -> Tensor:
    """Quantize each row of W [out, in] by OBQ with its order of columns forced, → Ŵ.

    Every row keeps its own inverse of H, from which each done column is taken out by Gaussian elimination.
    """
    out = torch.zeros_like(w, dtype=torch.float64)
    for i in range(w.shape[0]):
        row, inverse = w[i].double().clone(), torch.linalg.inv(h)
        for j in order or range(w.shape[1]):
            # `rounded` answers for all rows at once
            out[i, j] = rounded(j, row[j].expand(w.shape[0]))[i]
            row -= (row[j] - out[i, j]) / inverse[j, j] * inverse[:, j]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
            inverse[j, j] = 1.0  # done: only so that nothing divides by zero
    return out
