"""Ranges: scale and zero point of each block, from the values in it.

Every rule returns scales already rounded to the dtype in which the format stores them, so that codes chosen against
them are codes for what is on disk. An integer zero point demands that the range contain zero; a real one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantforge.numerics.blocks import tiles
from quantforge.numerics.formats import E8M0, Format
from quantforge.numerics.grids import IntGrid

if TYPE_CHECKING:
    from quantforge.numerics.qtensor import QTensor

_CHUNK = 1 << 17  # elements searched at once


@dataclass(frozen=True)
class Range:
    """Scale and zero point of each block.

    scale   [row blocks, column blocks] float32, every value exact in the format's stored dtype, > 0 and finite
    zero    the same shape, float32: integers within the grid, or real numbers exact in the stored dtype, or those that
            stored minima stand for, grid low − minimum / scale; all zeros when the format is symmetric
    nested  the codes of scale and zero where the format quantizes them; those scales may be of either sign, but not 0
    before  the scales before they were quantized, where plain rounding chooses codes against those; None otherwise
    """

    scale: Tensor
    zero: Tensor
    nested: tuple[QTensor | None, QTensor | None] = (None, None)
    before: Tensor | None = None


def stored(scale: Tensor, dtype: torch.dtype | Format) -> Tensor:
    """Round `scale` to `dtype` and back to float32; what would round to zero becomes the smallest normal number."""
    assert isinstance(dtype, torch.dtype), "scales that are quantized themselves are found by qtensor.fit"
    if dtype == E8M0:  # upwards, so that no block's largest value is clipped
        return torch.exp2(torch.log2(scale.double()).ceil().clamp(-126, 127)).float()
    return scale.float().clamp(torch.finfo(dtype).tiny, torch.finfo(dtype).max).to(dtype).float()


def from_limits(low: Tensor, high: Tensor, fmt: Format) -> Range:
    """Return the range that spans [low, high] of each block.

    Symmetric: scale = max(|low|, |high|) / ((2^bits − 1) / 2), so that the largest value errs by at most scale / 2; for
    tables, / max |value|.
    Asymmetric: scale = (high − low) / (2^bits − 1), zero_point = grid low − low / scale; an integer zero point is
    rounded, and zero is then included in the range. A real one is rounded to its dtype: no step is finer than what that
    may lose, and a block whose values differ by no more than that includes zero too. A block of zeros gets scale 1.
    """
    steps = fmt.grid.high - fmt.grid.low
    if fmt.symmetric:
        width = 2 * torch.maximum(low.abs(), high.abs())
        steps = steps if isinstance(fmt.grid, IntGrid) else 2 * max(-fmt.grid.low, fmt.grid.high)
        return Range(stored(torch.where(width > 0, width / steps, 1.0), fmt.scale), torch.zeros_like(width))
    if fmt.zero is not None:
        assert isinstance(fmt.zero, torch.dtype)
        finest = torch.maximum(low.abs(), high.abs()) * torch.finfo(fmt.zero).eps
        alike = high - low <= finest
        low, high = torch.where(alike, low.clamp(max=0), low), torch.where(alike, high.clamp(min=0), high)
        scale = torch.maximum((high - low) / steps, finest)
        scale = stored(torch.where(scale > 0, scale, 1.0), fmt.scale)
        return Range(scale, real_zero(fmt.grid.low - low / scale, fmt, scale))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = stored(torch.where(high > low, (high - low) / steps, 1.0), fmt.scale)
    zero = (fmt.grid.low - low / scale).round().clamp(fmt.grid.low, fmt.grid.high)
    return Range(scale, zero)


def plain_format(fmt: Format) -> Format:
    """Return `fmt` with scales, and real zero points, in float32 where they would be quantized themselves."""
    scale = torch.float32 if isinstance(fmt.scale, Format) else fmt.scale
    zero = torch.float32 if isinstance(fmt.zero, Format) else fmt.zero
    return replace(fmt, scale=scale, zero=zero)


def real_zero(zero: Tensor, fmt: Format, scale: Tensor | None = None) -> Tensor:
    """Round real zero points to what `fmt` stores of them in its dtype, and back to float32.

    scale  of the same shape: minima are rounded in units of the weight; without it their zero points stay as they are
    """
    if not fmt.minimum:
        return _to_dtype(zero, fmt.zero)
    if scale is None:
        return zero.float()
    return fmt.grid.low - minima(zero, scale, fmt) / scale


def minima(zero: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return the values that the lowest code has under real zero points, as `fmt` stores them, in float32."""
    return _to_dtype((fmt.grid.low - zero) * scale, fmt.zero)


def _to_dtype(x: Tensor, dtype: torch.dtype | Format | None) -> Tensor:
    assert isinstance(dtype, torch.dtype)
    return x.float().clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).float()


def round_to(x: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """Round `x` to the nearest storable value; scale and zero broadcast against it."""
    exact = x / scale  # every further matrix would cost as much as all of the arithmetic
    if fmt.symmetric:
        return fmt.grid.round_(exact).mul_(scale)
    return fmt.grid.round_(exact.add_(zero)).sub_(zero).mul_(scale)


def minmax(w: Tensor, fmt: Format, importance: Tensor | None = None) -> Range:
    """Span the smallest and the largest value of each block; `importance` plays no part."""
    blocks = tiles(w, fmt.block)
    return from_limits(blocks.amin(-1), blocks.amax(-1), fmt)  # twenty times as fast as aminmax


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
    middle = (low + high) / 2
    integer = isinstance(fmt.grid, IntGrid) and fmt.zero is None
    for shrink in shrinks:
        scale = stored(start.scale * shrink, fmt.scale)
        exact = blocks / scale[..., None]
        nearest = exact.round() if integer else exact
        for shift in (0,) if fmt.symmetric or fmt.zero is not None else (0, -1, 1):
            if integer:  # z is an integer: rounding is the same for all of them, only the clipping differs
                zero = (start.zero + shift).clamp(low, high)
                clipped = nearest.clamp((low - zero)[..., None], (high - zero)[..., None])
            else:  # both ends move towards the middle of the range
                zero = start.zero
                if fmt.zero is not None:
                    zero = real_zero(middle - (middle - zero) * (start.scale / scale), fmt, scale)
                clipped = fmt.grid.round(exact + zero[..., None]).sub_(zero[..., None])
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
