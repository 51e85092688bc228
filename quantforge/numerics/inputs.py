"""The input of a layer, rounded when the layer is called: by token, by tensor or by group, its wide channels spared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.numerics.blocks import Flat, spread
from quantforge.numerics.formats import E8M0, SCALE_DTYPES, Format, parse
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.qtensor import QTensor, fit, from_values
from quantforge.numerics.ranges import Range, from_limits, round_to

_STATIC = "-static"


@dataclass(frozen=True)
class Inputs:
    """How inputs [tokens, in] are to be rounded.

    format     its blocks are tokens (1, None), all tokens of a call (None, None), or groups of a token (1, n)
    static     ranges come from calibration and stay; False: they are found anew in every input
    threshold  channels in which an |x| reaches it stay in float (LLM.int8(), arXiv:2208.07339, section 3.2); inf: none
    dynamic    those channels are found anew in every input, as bitsandbytes does, and their weights are rounded like
               all others; False: they come from calibration, and their weights stay in float too
    """

    format: Format
    static: bool = False
    threshold: float = math.inf
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be above 0, not {self.threshold}; LLM.int8() has 6")
        if self.static and self.format.block != (None, None):
            raise ValueError(f"static ranges are for inputs by tensor, not {self.format}; int8-tensor-static works")
        if self.format.zero is not None:
            raise ValueError(f"inputs are rounded with integer zero points or none, not as {self.format}")
        block = self.format.block
        by_token = not isinstance(block, Flat) and (block[0] == 1 or block == (None, None))
        if not by_token or not isinstance(self.format.scale, torch.dtype):
            raise ValueError(f"inputs are rounded by token, tensor or group, not as {self.format}; int8-token works")

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the statistics it wants collected."""
        spares = math.isfinite(self.threshold) and not self.dynamic
        return ("extremes",) if self.static or spares else ()

    @property
    def mixes_tokens(self) -> bool:
        """Tell whether how one token is rounded depends on the others of its call."""
        anew = self.dynamic and math.isfinite(self.threshold)
        return anew or (self.format.block == (None, None) and not self.static)

    @property
    def short(self) -> str:
        """Return it as `parse_inputs` reads it, without the threshold."""
        text = self.format.short.replace("-channel", "-token").removesuffix("-sym")
        if self.format.scale not in (torch.float32, E8M0):
            text += f"-{next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.format.scale)}"
        return text + _STATIC * self.static

    def __str__(self) -> str:
        spared = f", |x| >= {self.threshold:g} in float" if math.isfinite(self.threshold) else ""
        return self.short + spared + (", found anew" if spared and self.dynamic else "")


def parse_inputs(text: str) -> Inputs:
    """Read a notation such as `int8-token`, `int8-tensor`, `int8-tensor-static` or `e4m3-token`; ValueError if none."""
    return Inputs(parse(text.removesuffix(_STATIC)), static=text.endswith(_STATIC))


@dataclass(frozen=True)
class Scheme:
    """How one layer is to be computed with: the format of its weights, and how it rounds its inputs, if it does."""

    weights: Format
    inputs: Inputs | None = None


@dataclass(frozen=True)
class QInput:
    """How one layer rounds its inputs: `inputs` with what calibration found.

    range   of the whole tensor, if it is static
    spared  [count] int32: channels that stay in float, ascending; None where there are none or they are found anew
    """

    inputs: Inputs
    range: Range | None = None
    spared: Tensor | None = None

    def round(self, x: Tensor) -> Tensor:
        """Return `x` [..., in] as it is after rounding, in its own dtype."""
        flat = x.reshape(-1, x.shape[-1]).float()
        if not flat.numel():
            return x
        kept, rest = self._split(flat)
        shape, fmt = (flat.shape[0], flat.shape[1]), self.inputs.format
        r = self._range(rest)
        out = round_to(rest, spread(r.scale, shape, fmt.block), spread(r.zero, shape, fmt.block), fmt)
        if kept is not None:
            out[:, kept] = flat[:, kept]
        return out.view(x.shape).to(x.dtype)

    def quantize(self, x: Tensor) -> tuple[QTensor, Tensor]:
        """Return `x` [tokens, in] as codes, and the indices of the channels that stay in float, whose codes mean 0."""
        kept, rest = self._split(x.float())
        shape, fmt = (x.shape[0], x.shape[1]), self.inputs.format
        r = self._range(rest)
        if kept is not None:
            rest = rest.index_fill(1, kept, 0.0)
        values = rest / spread(r.scale, shape, fmt.block) + spread(r.zero, shape, fmt.block)
        return from_values(values, r, fmt), torch.empty(0, dtype=torch.long) if kept is None else kept

    def _range(self, x: Tensor) -> Range:
        if self.range is None:
            return fit(x, self.inputs.format)
        return Range(self.range.scale.to(x.device), self.range.zero.to(x.device))

    def _split(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the channels of `x` [tokens, in] that stay in float, or None, and what the ranges are found from.

        Channels that calibration fixed count for no range. Those found anew count with the values below the threshold,
        as in bitsandbytes.
        """
        if self.spared is not None:
            spared = self.spared.long().to(x.device)
            return spared, x.index_fill(1, spared, 0.0)
        if not self.inputs.dynamic or not math.isfinite(self.inputs.threshold):
            return None, x
        wide = x.abs() >= self.inputs.threshold
        kept = wide.any(0).nonzero().flatten()
        return (kept, x.masked_fill(wide, 0.0)) if len(kept) else (None, x)


def settle(inputs: Inputs, low: Tensor, high: Tensor, dtype: torch.dtype) -> QInput:
    """Fix what calibration is to fix, from the smallest and the largest input of each channel, [in] each.

    dtype  in which a static scale is stored
    """
    spared = None
    if math.isfinite(inputs.threshold) and not inputs.dynamic:
        wide = torch.maximum(low.abs(), high.abs()) >= inputs.threshold
        spared = wide.nonzero().flatten().int()
        low, high = low.masked_fill(wide, 0.0), high.masked_fill(wide, 0.0)
    found = None
    if inputs.static:
        fmt = inputs.format.with_scale(dtype)
        found = from_limits(low.min().view(1, 1), high.max().view(1, 1), fmt)
    return QInput(inputs, found, spared)


def integer_product(x: QTensor, weight: QTensor) -> Tensor:
    """Return x [tokens, in] times weight [out, in]ᵀ with the codes multiplied as integers and summed in 32 bits.

    Both have symmetric integer formats, x with one scale a token or one in all, the weight with one a row or one in
    all. Returns float32 [tokens, out].
    """
    for part in (x, weight):
        if not isinstance(part.format.grid, IntGrid) or not part.format.symmetric or part.scale.shape[1] != 1:
            raise ValueError(f"an integer product needs symmetric integers with a scale a row, not {part.format}")
    a, b = ((q.format.grid.decode(q.codes)).to(torch.int8) for q in (x, weight))
    whole = len(a) and a.device.type == "cpu"  # elsewhere shapes must be multiples; sums of integers fit float64
    total = torch._int_mm(a, b.T.contiguous()) if whole else a.double() @ b.double().T
    scales = [q.scale.float() if isinstance(q.scale, Tensor) else q.scale.dequantize() for q in (x, weight)]
    return total.float() * scales[0] * scales[1].T
