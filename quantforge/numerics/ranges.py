"""Ranges: scale and zero point of each block, from the values in it.

Every rule returns scales already rounded to the dtype in which the format stores them, so that codes chosen against
them are codes for what is on disk. An asymmetric range always contains zero, as an integer zero point demands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.numerics.blocks import tiles
from quantforge.numerics.formats import Format

_CHUNK = 1 << 17  # elements searched at once


@dataclass(frozen=True)
class Range:
    """Scale and zero point of each block.

    scale  [row blocks, column blocks] float32, every value exact in the format's stored dtype, > 0 and finite
    zero   the same shape, float32 integers within the grid; all zeros when the format is symmetric
    """

    scale: Tensor
    zero: Tensor


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round `scale` to `dtype` and back to float32; what would round to zero becomes the smallest normal number."""
    return scale.float().clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype).float()


def from_limits(low: Tensor, high: Tensor, fmt: Format) -> Range:
    """Return the range that spans [low, high] of each block.

    Symmetric: scale = max(|low|, |high|) / ((2^bits − 1) / 2), so that the largest value errs by at most scale / 2.
    Asymmetric: zero is included, scale = (high − low) / (2^bits − 1), zero_point = round(grid low − low / scale).
    A block of zeros gets scale 1.
    """
    steps = fmt.grid.high - fmt.grid.low
    if fmt.symmetric:
        width = 2 * torch.maximum(low.abs(), high.abs())
        return Range(stored(torch.where(width > 0, width / steps, 1.0), fmt.scale), torch.zeros_like(width))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored(torch.where(high > low, (high - low) / steps, 1.0), fmt.scale)
    zero = (fmt.grid.low - low / scale).round().clamp(fmt.grid.low, fmt.grid.high)
    return Range(scale, zero)


def round_to(x: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """Round `x` to the nearest storable value (an integer grid); scale and zero broadcast against it."""
    return (x / scale + zero).round_().clamp_(fmt.grid.low, fmt.grid.high).sub_(zero).mul_(scale)


def minmax(w: Tensor, fmt: Format, importance: Tensor | None = None) -> Range:
    """Span the smallest and the largest value of each block; `importance` plays no part."""
    low, high = tiles(w, fmt.block).aminmax(dim=-1)
    return from_limits(low, high, fmt)


def percentile(w: Tensor, fmt: Format, importance: Tensor | None = None, p: float = 99.9) -> Range:
    """Span the (100 − p)th to the pth percentile of each block; what lies outside is clipped."""
    blocks = tiles(w, fmt.block)
    if fmt.symmetric:
        high = _quantile(blocks.abs(), p / 100)
        return from_limits(-high, high, fmt)
    return from_limits(_quantile(blocks, 1 - p / 100), _quantile(blocks, p / 100), fmt)


def _quantile(x: Tensor, q: float) -> Tensor:
    """Return the quantile of the last axis by linear interpolation; torch.quantile refuses 2^24 elements and more."""
    place = q * (x.shape[-1] - 1)
    below = int(place)
    low = x.kthvalue(below + 1, dim=-1).values
    high = x.kthvalue(min(below + 2, x.shape[-1]), dim=-1).values
    return torch.lerp(low, high, place - below)


def mse(
    w: Tensor,
    fmt: Format,
    importance: Tensor | None = None,
    grid: int = 20,
    max_shrink: float = 0.5,
    power: float = 2.0,
) -> Range:
    """Search shrunken ranges, and neighbouring zero points, for the least Σ importance · |error|^power of each block.

    w           [rows, cols] float32
    importance  [cols] or [rows, cols], ≥ 0: with what an error costs under the Hessian this is the Hessian-weighted
                error; None weighs all alike
    grid        how many steps of shrinking from 1 down to 1 − max_shrink; the first is min-max, so it is never worse
    power       2 for squared error; GPTQ's own clipping search uses 2.4
    """
    start = minmax(w, fmt)
    blocks = tiles(w, fmt.block)
    if importance is None and blocks.numel() != w.numel():
        importance = torch.ones_like(w)  # what fills up a short block must not count
    weights = None if importance is None else tiles(importance.expand_as(w).contiguous(), fmt.block, fill=0.0)
    rows = max(_CHUNK // max(blocks[0].numel(), 1), 1)  # as much as the cache holds: three times as fast
    found = []
    for i in range(0, len(blocks), rows):
        part = slice(i, i + rows)
        begin = Range(start.scale[part], start.zero[part])
        shrinks = [1 - max_shrink * step / grid for step in range(grid + 1)]
        found.append(_search(blocks[part], begin, fmt, shrinks, power, None if weights is None else weights[part]))
    return Range(torch.cat([r.scale for r in found]), torch.cat([r.zero for r in found]))


def _search(
    blocks: Tensor, start: Range, fmt: Format, shrinks: list[float], power: float, weights: Tensor | None
) -> Range:
    """Return the best range of `blocks` [row blocks, column blocks, elements] among the shrunken ones of `start`."""
    best = start
    least = torch.full_like(start.scale, torch.inf, dtype=blocks.dtype)
    low, high = fmt.grid.low, fmt.grid.high
    for shrink in shrinks:
        scale = stored(start.scale * shrink, fmt.scale)
        exact = blocks / scale[..., None]
        nearest = exact.round()
        for shift in (0,) if fmt.symmetric else (0, -1, 1):
            zero = (start.zero + shift).clamp(low, high)
            clipped = nearest.clamp((low - zero)[..., None], (high - zero)[..., None])
            error = clipped.sub_(exact).abs_().pow_(power) if power != 2 else clipped.sub_(exact).square_()
            loss = (error if weights is None else error.mul_(weights)).sum(-1) * (scale / start.scale) ** power
            better = loss < least
            least = torch.where(better, loss, least)
            best = Range(torch.where(better, scale, best.scale), torch.where(better, zero, best.zero))
    return best


def plain_mse(w: Tensor, fmt: Format, importance: Tensor | None = None) -> Range:
    """Search as `mse` does, with all weights alike whatever their `importance`."""
    return mse(w, fmt)


RangeRule = Callable[..., Range]
RULES: dict[str, RangeRule] = {"minmax": minmax, "percentile": percentile, "mse": plain_mse, "hessian": mse}


def rule(name: str) -> RangeRule:
    """Return the range rule called `name`; ValueError if there is none."""
    if name not in RULES:
        raise ValueError(f"no range rule is called {name!r}; there are {', '.join(RULES)}")
    return RULES[name]
