"""Weights and inputs in E4M3 with a scale a row and a token: torch's scaled product, on GPUs that have it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantforge.numerics.formats import E8M0
from quantforge.numerics.inputs import QInput
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import fit
from quantforge.runtime.integers import spares
from quantforge.runtime.kernel import nbytes

NAME = "fp8"
_GRID = "e4m3"
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_UNIT = 16  # inputs and outputs must be multiples of it


def meant_for(weight: QWeight) -> bool:
    """Tell whether the operator is for the format of `weight`."""
    return weight.base.format.grid.name == _GRID


def refuses(weight: QWeight, device: str) -> str | None:
    """Return why the operator cannot compute with a weight that it is meant for; None if it can."""
    q, rounds = weight.base, weight.inputs
    if rounds is None or rounds.inputs.format.grid.name != _GRID:
        return "fp8 products take inputs in e4m3 too"
    inputs = rounds.inputs
    if q.format.block not in ((1, None), (None, None)) or not isinstance(q.format.scale, torch.dtype):
        return f"fp8 products take one scale a row, not {q.format.short}"
    if inputs.format.block not in ((1, None), (None, None)) or inputs.format.scale == E8M0:
        return f"fp8 products take inputs with one scale a token, not {inputs}"
    if spares(weight):
        return "channels of its inputs stay in float"
    if q.shape[0] % _UNIT or q.shape[1] % _UNIT:
        return f"{q.shape[0]} x {q.shape[1]} are no multiples of {_UNIT}"
    return None


@dataclass(frozen=True, eq=False)
class FP8:
    """A weight for scaled products: codes [out, in] float8_e4m3fn, scale [1, out] float32."""

    codes: Tensor
    scale: Tensor
    rounds: QInput
    operator: str = field(default=NAME, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes and scales."""
        return nbytes((self.codes, self.scale))

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in], rounded, times the weight → [tokens, out]."""
        values, scale = input_codes(x, self.rounds)
        out = torch._scaled_mm(values, self.codes.T, scale, self.scale, out_dtype=torch.bfloat16)
        return out.to(x.dtype)


def input_codes(x: Tensor, rounds: QInput) -> tuple[Tensor, Tensor]:
    """Return `x` [tokens, in] as float8_e4m3fn, and the scale of each token [tokens, 1] float32.

    The same as of `QInput.quantize`: torch rounds to even and makes NaN of what is too large, which is clamped before.
    """
    wide = x.float()
    scale = fit(wide, rounds.inputs.format).scale if rounds.range is None else rounds.range.scale.to(x.device)
    scale = scale.float()
    values = (wide / scale).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return values, scale.expand(len(x), 1).contiguous()


def pack(weight: QWeight, device: str) -> FP8:
    """Pack a weight that `refuses` takes; residuals beside its codes are left out."""
    q = weight.base
    assert weight.inputs is not None
    assert isinstance(q.scale, Tensor)
    scale = q.scale.float().expand(q.shape[0], 1).reshape(1, -1).contiguous().to(device)
    return FP8(q.format.grid.decode(q.codes).to(torch.float8_e4m3fn).to(device), scale, weight.inputs)
