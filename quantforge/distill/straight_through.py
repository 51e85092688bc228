"""Rounding that trains: forwards exactly what is stored, backwards the gradient of an estimator.

What a training step computes with is bit for bit what the checkpoint will hold, so nothing is lost when it is written.
Three things can be trained: the weights under the rounding (straight-through estimator, Bengio et al.,
arXiv:1308.3432), these with scales and zero points (LSQ, Esser et al., ICLR 2020, arXiv:1902.08153; zero points as in
LSQ+, arXiv:2004.09576), or scales and zero points alone, under codes that stay, such as those that GPTQ has chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantforge.errors import RecipeError
from quantforge.numerics.blocks import Block, Flat, spread, tiles
from quantforge.numerics.formats import E8M0, Format
from quantforge.numerics.inputs import QInput
from quantforge.numerics.qtensor import QTensor, encode, fit, quantize
from quantforge.numerics.ranges import Range, real_zero, round_to, stored


def fake_quantize(weight: Tensor, fmt: Format, rule: str = "minmax", *, limit: float | None = None) -> Tensor:
    """Return `weight` [rows, cols] as `fmt` stores it, its ranges found anew; the gradient is that of the result.

    rule   how ranges are found: a name of `numerics.ranges.RULES`
    limit  no gradient reaches weights of at least this size, as in the code of LLM-QAT, arXiv:2305.17888 (2.0 there);
           None: all get theirs
    The value is that of the codes in the dtype of `weight`, as a loader computes it.
    """
    return _through(weight, lambda w: _round(w, fmt, rule), limit)


def fake_quantize_inputs(x: Tensor, how: QInput, *, limit: float | None = None) -> Tensor:
    """Return `x` [..., in] as the layer rounds its inputs, in its own dtype; the gradient is that of the result.

    limit  as of `fake_quantize`
    """
    return _through(x, how.round, limit)


def learned_quantize(
    weight: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format, *, balanced: bool = False
) -> Tensor:
    """Return `weight` [rows, cols] rounded under trained ranges, with gradients for it, its scales and zero points.

    scale     [row blocks, column blocks] float32; it is rounded to the dtype in which it is stored, straight through
    zero      the same shape, None if `fmt` is symmetric; rounded to an integer, or to its dtype, likewise
    balanced  gradients of scales are divided by √(weights of a block · largest code), as LSQ does, so that one learning
              rate suits scales and weights
    With v = w / s + z: d/ds is q − v within the grid and q − z beyond its ends, d/dz is 0 and −s, d/dw is 1 and 0.
    Raises RecipeError if the format quantizes its scales or zero points.
    """
    _refuse_nested(fmt)
    found: Tensor = _Learned.apply(weight, scale, zero, fmt, balanced)  # type: ignore[no-untyped-call]
    return found


def trained_range(scale: Tensor, zero: Tensor | None, fmt: Format) -> Range:
    """Return the range that trained values stand for, as `fmt` stores it; `quantize` then gives the codes to save."""
    scale = stored(scale.detach(), fmt.scale)
    if zero is None:
        return Range(scale, torch.zeros_like(scale))
    if isinstance(fmt.zero, torch.dtype):
        return Range(scale, real_zero(zero.detach(), fmt))
    return Range(scale, zero.detach().float().round().clamp(fmt.grid.low, fmt.grid.high))


def range_to_train(matrix: QTensor) -> tuple[Tensor, Tensor | None]:
    """Return copies of scales and zero points in float32, to start training from; zero points None if there are none.

    Raises RecipeError if the format quantizes its scales or zero points.
    """
    _refuse_nested(matrix.format)
    assert isinstance(matrix.scale, Tensor)
    assert not isinstance(matrix.zero, QTensor)
    return matrix.scale.detach().float().clone(), None if matrix.zero is None else matrix.zero.detach().float().clone()


def with_range(matrix: QTensor, scale: Tensor, zero: Tensor | None = None) -> QTensor:
    """Return `matrix` with its codes under trained scales, and zero points unless None, as its format stores them."""
    fmt = matrix.format
    _refuse_nested(fmt)
    assert isinstance(fmt.scale, torch.dtype)
    r = trained_range(scale, zero, fmt)
    dtype = fmt.zero if isinstance(fmt.zero, torch.dtype) else torch.int8
    return replace(matrix, scale=r.scale.to(fmt.scale), zero=matrix.zero if zero is None else r.zero.to(dtype))


def dequantize_trained(
    matrix: QTensor, scale: Tensor, zero: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values [rows, cols] of `matrix` under trained scales, with gradients for these; its codes stay.

    scale, zero  as of `learned_quantize`; zero points stay what they are if None
    dtype        in which values are computed, as by `QTensor.dequantize`
    Raises RecipeError if the format quantizes its scales or zero points.
    """
    found: Tensor = _Rescaled.apply(scale, zero, matrix, dtype)  # type: ignore[no-untyped-call]
    return found


class _Through(torch.autograd.Function):
    """Gives the rounded value, and passes the gradient on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Callable[[Tensor], Tensor], limit: float | None) -> Tensor:
        ctx.limit = limit
        if limit is not None:
            ctx.save_for_backward(x)
        return rounded(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if ctx.limit is None:
            return upstream, None, None
        (x,) = ctx.saved_tensors
        return upstream.masked_fill(x.abs() >= ctx.limit, 0.0), None, None


class _Learned(torch.autograd.Function):
    """Rounds under a trained range; what the gradient needs is worked out anew from weight, scale and zero point."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format, balanced: bool) -> Tensor:
        ctx.format, ctx.balanced, ctx.symmetric = fmt, balanced, zero is None
        ctx.save_for_backward(weight, scale, *([] if zero is None else [zero]))
        return _value(weight, trained_range(scale, zero, fmt), fmt)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        weight, scale, *rest = ctx.saved_tensors
        fmt: Format = ctx.format
        shape = (weight.shape[0], weight.shape[1])
        r = trained_range(scale, rest[0] if rest else None, fmt)
        s, z = (spread(part, shape, fmt.block) for part in (r.scale, r.zero))
        g, exact = upstream.float(), weight.float() / s
        code = fmt.grid.round(exact + z) - z
        inside = (exact + z >= fmt.grid.low) & (exact + z <= fmt.grid.high)
        by_scale = _summed(g * (code - exact.masked_fill(~inside, 0.0)), fmt.block)
        if ctx.balanced:
            by_scale = by_scale / (weight.numel() / scale.numel() * fmt.grid.high) ** 0.5
        by_zero = None if ctx.symmetric else _summed(g.masked_fill(inside, 0.0), fmt.block) * -r.scale
        return upstream.masked_fill(~inside, 0.0), by_scale, by_zero, None, None


class _Rescaled(torch.autograd.Function):
    """Gives the values of codes under a trained range."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, zero: Tensor | None, matrix: QTensor, dtype: torch.dtype) -> Tensor:
        ctx.matrix = with_range(matrix, scale, zero)
        found: Tensor = ctx.matrix.dequantize(dtype)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        matrix: QTensor = ctx.matrix
        fmt, shape = matrix.format, matrix.shape
        assert isinstance(matrix.scale, Tensor)
        g, code = upstream.float(), fmt.grid.decode(matrix.codes)
        if isinstance(matrix.zero, Tensor):
            code -= spread(matrix.zero.float(), shape, fmt.block)
        by_zero = _summed(g, fmt.block) * -matrix.scale.float() if ctx.needs_input_grad[1] else None
        return _summed(code.mul_(g), fmt.block), by_zero, None, None


def _through(x: Tensor, rounded: Callable[[Tensor], Tensor], limit: float | None) -> Tensor:
    found: Tensor = _Through.apply(x, rounded, limit)  # type: ignore[no-untyped-call]
    return found


def _round(weight: Tensor, fmt: Format, rule: str) -> Tensor:
    """Return what `fmt` stores of `weight`, in its dtype."""
    wide = weight.float()
    if fmt.centered:
        return encode(wide, fmt).dequantize(weight.dtype)
    return _value(weight, fit(wide, fmt, rule), fmt)


def _value(weight: Tensor, r: Range, fmt: Format) -> Tensor:
    """Return `weight` rounded under the range `r`, in its dtype; without the detour over codes where that is exact."""
    plain = isinstance(fmt.scale, torch.dtype) and not isinstance(fmt.zero, Format) and not isinstance(fmt.block, Flat)
    if weight.dtype != torch.float32 or not plain or fmt.minimum:
        return quantize(weight.float(), r, fmt).dequantize(weight.dtype)
    shape = (weight.shape[0], weight.shape[1])
    scale, zero = spread(r.scale, shape, fmt.block), spread(r.zero, shape, fmt.block)
    return round_to(weight, scale, zero, fmt).add_(0.0)  # codes know no −0


def _summed(x: Tensor, block: Block) -> Tensor:
    """Return the sum of each block of `x` [rows, cols]."""
    return tiles(x, block, fill=0.0).sum(-1)


def _refuse_nested(fmt: Format) -> None:
    if isinstance(fmt.scale, Format) or isinstance(fmt.zero, Format):
        raise RecipeError(
            245, f"{fmt} quantizes its scales, which cannot be trained then; int4-g64-asym or nf4-g64 can be."
        )
    if fmt.scale == E8M0:
        raise RecipeError(245, f"the scales of {fmt} are powers of two, which cannot be trained; their weights can be.")
    if fmt.minimum:
        raise RecipeError(245, f"{fmt} stores minima, which cannot be trained; int4-g32-sym and int4-g32-asym can be.")
