"""Integers of at most 8 bits with a scale a row, inputs in float: the int8 product of oneDNN, or torch's own.

oneDNN multiplies integers by integers, so that each token is written as two digits of 8 bits: x ≈ scale · (256 high +
low), with 16 bits for the largest |x| of the token. Both are rows of one product. An input errs by at most 2^−16 of the
token's largest. torch's own operator takes inputs in bfloat16, which errs by up to 2^−8 of the input itself, and rounds
the outputs so too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantforge.numerics.blocks import extents
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.runtime.integers import groups, is_integer
from quantforge.runtime.kernel import nbytes

NAME, DIGITS = "int8", "int8 in two digits"
_MIDDLE = 128
_TOP = 32639.0  # 127 · 256 + 127: the largest number that two signed digits write


def meant_for(weight: QWeight) -> bool:
    """Tell whether the operators are for the format and inputs of `weight`; groups of up to 4 bits are int4's."""
    q = weight.base
    if not is_integer(q) or weight.inputs is not None:
        return False
    return q.format.grid.bits > 4 or _by_row(q)


def refuses(weight: QWeight, device: str) -> str | None:
    """Return why the operators cannot compute with a weight that they are meant for; None if they can."""
    return None if _by_row(weight.base) else f"{weight.base.format.short} has more than one scale a row"


def refuses_zeros(weight: QWeight, device: str) -> str | None:
    """Return why torch's own operator cannot compute with a weight that it is meant for; None if it can."""
    if weight.base.zero is not None and _by_row(weight.base):
        return "torch's int8 product takes weights without zero points"
    return refuses(weight, device)


def _by_row(q: QTensor) -> bool:
    return extents(q.shape, q.format.block)[1] == q.shape[1]


class OneDNN:
    """Signed integers [out, in] packed for oneDNN, multiplied exactly; a tensor whose bytes torch cannot see."""

    def __init__(self, codes: Tensor) -> None:
        """Pack `codes` [out, in] int8."""
        self.shape = (codes.shape[0], codes.shape[1])
        self._packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
        self._ones, self._zeros = torch.ones(1), torch.zeros(1, dtype=torch.long)

    @property
    def nbytes(self) -> int:
        """Count a byte a code, and 4 a row for what oneDNN adds for signed inputs."""
        return self.shape[0] * self.shape[1] + 4 * self.shape[0]

    def product(self, x: Tensor) -> Tensor:
        """Return int8 `x` [tokens, in] times the codes → [tokens, out], integers in float32."""
        return self.raised(x.view(torch.uint8) ^ _MIDDLE)

    def raised(self, x: Tensor) -> Tensor:
        """Return the same for uint8 `x` that is 128 above what it stands for; of signed inputs oneDNN is no faster
        than a plain loop.
        """
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, _MIDDLE, self._packed, self._ones, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out


@dataclass(frozen=True, eq=False)
class Digits:
    """A weight for products with inputs in two digits.

    scale   [out] float32
    offset  [out] float32: added to every weight of the row; None where it is 0
    """

    codes: OneDNN
    scale: Tensor
    offset: Tensor | None
    operator: str = field(default=DIGITS, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes, scales and offsets."""
        return self.codes.nbytes + nbytes((self.scale, self.offset))

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in] times the weight → [tokens, out]."""
        wide = x.float()
        step = wide.abs().amax(1, keepdim=True).div_(_TOP).clamp_(min=torch.finfo(torch.float32).tiny)
        both = self.codes.raised(_digits(wide / step))
        out = torch.add(both[: len(x)], both[len(x) :], alpha=256).mul_(step).mul_(self.scale)
        if self.offset is not None:
            out.addcmul_(wide.sum(1, keepdim=True), self.offset)
        return out.to(x.dtype)


def _digits(x: Tensor) -> Tensor:
    """Return numbers |x| <= 32639 [tokens, in], rounded, as uint8 [2 · tokens, in]: low digits, then high, + 128 each.

    x = 256 (high − 128) + (low − 128), so that both are the bytes of x + 128 · 257, modulo 2^16.
    """
    pairs = x.round_().to(torch.int16).add_(_MIDDLE * 257 - (1 << 16)).view(torch.uint8)
    return pairs.view(*x.shape, 2).permute(2, 0, 1).reshape(2 * x.shape[0], x.shape[1])


@dataclass(frozen=True, eq=False)
class Int8:
    """A weight as torch's own int8 product takes it: codes [out, in] int8, scale [out] bfloat16; no offsets."""

    codes: Tensor
    scale: Tensor
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
        """Return x [tokens, in] times the weight → [tokens, out]."""
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16), self.codes, self.scale)
        return out.to(x.dtype)


def pack_digits(weight: QWeight, device: str) -> Digits:
    """Pack a weight for oneDNN."""
    parts = groups(weight.base)
    return Digits(OneDNN(parts.codes), parts.scale[:, 0].contiguous(), _column(parts.offset))


def pack(weight: QWeight, device: str) -> Int8:
    """Pack a symmetric weight for torch's own operator."""
    parts = groups(weight.base)
    return Int8(parts.codes.contiguous().to(device), parts.scale[:, 0].to(device, torch.bfloat16))


def held(weight: QWeight) -> Tensor:
    """Return the float32 weight [out, in] that torch's own operator computes with: its scales are bfloat16."""
    parts = groups(weight.base)
    return parts.codes.float() * parts.scale.to(torch.bfloat16).float()


def _column(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[:, 0].contiguous()
