"""A matrix held as codes, and the arithmetic between it and floats."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantforge.numerics.blocks import Flat, counts, spread, tiles
from quantforge.numerics.formats import E8M0, Format
from quantforge.numerics.ranges import Range, minima, plain_format, real_zero, rule


@dataclass(frozen=True)
class QTensor:
    """A matrix [rows, cols] held as codes: x ≈ offset + scale · (grid[code] − zero), or scale · code + minimum.

    codes   [rows, cols] uint8, indices into `format.grid.values`
    scale   [row blocks, column blocks], > 0 and finite, in the dtype `format.scale`; or codes of that format
    zero    the same shape: int8 values of the grid, or real numbers as `format.zero` says, which are minima where the
            format has them; None when it is symmetric
    offset  the mean that was taken off, a float32 scalar; None unless the format is centered
    """

    format: Format
    codes: Tensor
    scale: Tensor | QTensor
    zero: Tensor | QTensor | None = None
    offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Return (rows, cols)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbits(self) -> int:
        """Count every bit that must be stored."""
        return self.format.nbits(self.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return offset + (value − zero) · scale computed in `dtype`, as every loader does.

        The default is the dtype of the scales; float32 where they are quantized. Flat blocks and narrow integers, as in
        bitsandbytes, and what only quantforge reads, quantized scales and real zero points, are computed in float32 and
        rounded; so is code · scale + minimum, as GGUF's readers do.
        """
        if self.format.minimum:
            return self._from_minima(dtype)
        plain = not isinstance(self.format.block, Flat) and not self.format.grid.name.startswith("narrow")
        stock = plain and isinstance(self.scale, Tensor) and self.format.zero is None
        if not stock and dtype not in (None, torch.float32, torch.float64):
            return self.dequantize(torch.float32).to(dtype)
        scale = _dense(self.scale)
        dtype = dtype or (scale.dtype if isinstance(self.scale, Tensor) else torch.float32)
        value = self.format.grid.decode(self.codes).to(dtype)
        if self.zero is not None:
            value -= spread(_dense(self.zero), self.shape, self.format.block).to(dtype)
        value.mul_(spread(scale, self.shape, self.format.block).to(dtype))
        return value if self.offset is None else value.add_(self.offset.to(dtype))

    def _from_minima(self, dtype: torch.dtype | None) -> Tensor:
        assert isinstance(self.scale, Tensor)
        assert isinstance(self.zero, Tensor)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        value = self.codes.to(wide)  # how many steps above the lowest
        value.mul_(spread(self.scale, self.shape, self.format.block).to(wide))
        value.add_(spread(self.zero, self.shape, self.format.block).to(wide))
        return value.to(dtype or self.scale.dtype)

    def zero_points(self) -> Tensor | None:
        """Return zero points in units of a code, in float32, also where minima are stored; None if symmetric."""
        if self.zero is None or not self.format.minimum:
            return None if self.zero is None else _dense(self.zero).float()
        return self.format.grid.low - _dense(self.zero).float() / _dense(self.scale).float()

    def rows(self, start: int, stop: int) -> QTensor:
        """Return rows `start` to `stop`, which must not cut through what the format stores together."""
        unit = self.format.cut_unit
        if unit is None or start % unit or (stop % unit and stop != self.shape[0]):
            raise ValueError(f"{self.format} shares scales between rows, which cannot be cut apart")
        block = self.format.block
        assert not isinstance(block, Flat)
        assert block[0] is not None
        high = block[0]
        first, last = start // high, -(-stop // high)
        zero = None if self.zero is None else _rows(self.zero, first, last)
        return QTensor(self.format, self.codes[start:stop], _rows(self.scale, first, last), zero)

    def to(self, device: torch.device | str) -> QTensor:
        """Return it on `device`."""
        move = {part: getattr(self, part) for part in ("codes", "scale", "zero", "offset")}
        return replace(self, **{part: value.to(device) for part, value in move.items() if value is not None})


def _dense(x: Tensor | QTensor) -> Tensor:
    if isinstance(x, QTensor):
        return x.dequantize(torch.float32)
    return x.float() if x.dtype == E8M0 else x


def _rows(x: Tensor | QTensor, start: int, stop: int) -> Tensor | QTensor:
    if not isinstance(x, QTensor):
        return x[start:stop]
    if x.format.block == (None, None):
        return replace(x, codes=x.codes[start:stop])
    return x.rows(start, stop)


def fit(w: Tensor, fmt: Format, name: str = "minmax", importance: Tensor | None = None) -> Range:
    """Find the range of `w` [rows, cols] by the rule `name`, as `fmt` will store it.

    importance  [cols] or [rows, cols] for rules that weigh errors
    Where scales or zero points are quantized themselves, the rule's are, and zero points then follow their scales.
    Double quantization as of QLoRA, arXiv:2305.14314, comes after the codes were chosen, for which `before` is kept.
    """
    if not isinstance(fmt.scale, Format) and not isinstance(fmt.zero, Format):
        return rule(name)(w, fmt, importance)
    found = rule(name)(w, plain_format(fmt), importance)
    scale, nested_scale, before = found.scale, None, None
    if isinstance(fmt.scale, Format):
        before = scale if fmt.scale.centered and fmt.symmetric else None
        empty = ~(tiles(w, fmt.block) != 0).any(-1)
        nested_scale = encode(scale.masked_fill(empty, 0.0), fmt.scale)
        if fmt.scale.grid.name.startswith("shift"):
            nested_scale = _shifted(w, fmt, scale, nested_scale, name != "minmax", importance)
        scale = nested_scale.dequantize(torch.float32)
        scale = torch.where(scale == 0, torch.finfo(torch.float32).tiny, scale)
    zero, nested_zero = found.zero, None
    if fmt.zero is not None:  # the middle of the range stays where it was
        middle = (fmt.grid.low + fmt.grid.high) / 2
        # a scale that came out at about nothing must not spoil the zero points that are stored with its own
        zero = middle - (middle - zero) * (found.scale / scale).clamp(-4, 4)
    if isinstance(fmt.zero, Format):
        nested_zero = encode(zero, fmt.zero)
        zero = nested_zero.dequantize(torch.float32)
    elif fmt.zero is not None:
        zero = real_zero(zero, fmt, scale)
    return Range(scale, zero, (nested_scale, nested_zero), before)


def _shifted(
    w: Tensor, fmt: Format, scale: Tensor, nested: QTensor, search: bool, importance: Tensor | None
) -> QTensor:
    """Choose among scales that differ by shifts: the first at least as large as `scale`, or by `search` the next too.

    ZeroQuant-FP, arXiv:2307.09782, section 3, constraint M2. With `search`, each block takes the one of the two that
    errs less (our reading; rounding the shift up as written there makes the block's largest value saturate).
    """
    inner = replace(nested, codes=torch.full_like(nested.codes, len(nested.format.grid.values) - 1))
    top = inner.dequantize(torch.float32)
    table = torch.tensor(nested.format.grid.values, dtype=torch.float32, device=w.device)
    upper = torch.searchsorted(table, (scale / top * (1 - 1e-6)).contiguous()).clamp(max=len(table) - 1)
    codes = upper
    if search:
        weigh = torch.ones_like(w) if importance is None else importance.expand_as(w).contiguous()
        blocks, weights = tiles(w, fmt.block), tiles(weigh, fmt.block, fill=0.0)
        errors = []
        for shifted in (upper, (upper - 1).clamp(min=0)):
            s = (table[shifted] * top)[..., None]
            errors.append(((fmt.grid.round(blocks / s) * s - blocks).square() * weights).sum(-1))
        codes = torch.where(errors[1] < errors[0], (upper - 1).clamp(min=0), upper)
    return replace(nested, codes=codes.to(torch.uint8))


def encode(x: Tensor, fmt: Format) -> QTensor:
    """Round `x` [rows, cols] to `fmt` under min-max ranges."""
    if not fmt.centered:
        return quantize(x, fit(x, fmt), fmt)
    offset = x.mean()
    plain = replace(fmt, centered=False)
    return replace(quantize(x - offset, fit(x - offset, plain), plain), format=fmt, offset=offset)


def from_values(value: Tensor, r: Range, fmt: Format) -> QTensor:
    """Store `value` [rows, cols], already on the grid (integers for an integer grid), under the range `r`."""
    scale, zero = r.nested
    kept: Tensor | QTensor | None = zero
    if zero is None and not fmt.symmetric:
        found = minima(r.zero, r.scale, fmt) if fmt.minimum else r.zero
        kept = found.to(fmt.zero if isinstance(fmt.zero, torch.dtype) else torch.int8)
    if scale is None:
        assert isinstance(fmt.scale, torch.dtype)
        return QTensor(fmt, fmt.grid.encode(value), r.scale.to(fmt.scale), kept)
    return QTensor(fmt, fmt.grid.encode(value), scale, kept)


def quantize(x: Tensor, r: Range, fmt: Format) -> QTensor:
    """Round `x` [rows, cols] to the nearest value that `fmt` can store under the range `r`, or under `r.before`."""
    shape = (x.shape[0], x.shape[1])
    if r.scale.shape != counts(shape, fmt.block):
        raise ValueError(f"a range of shape {tuple(r.scale.shape)} does not fit {shape} in blocks of {fmt.block}")
    value = _divide(x, spread(r.scale if r.before is None else r.before, shape, fmt.block), fmt)
    zero = real_zero(r.zero, fmt, r.scale) if fmt.minimum else r.zero  # of ranges that were made without regard to it
    value += spread(zero, shape, fmt.block)
    return from_values(value, r, fmt)


def _divide(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return x / scale; in flat blocks by the reciprocal, except the short one, as bitsandbytes does it on a CPU."""
    if not isinstance(fmt.block, Flat):
        return x / scale
    whole = x.numel() - x.numel() % fmt.block.size
    x, scale, shape = x.reshape(-1), scale.reshape(-1), x.shape
    return torch.cat([x[:whole] * scale[:whole].reciprocal(), x[whole:] / scale[whole:]]).view(shape)
