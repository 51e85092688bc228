"""Weights and inputs both integers: an exact int8 product, rescaled; in LLM.int8() the widest channels stay in float.

The same numbers as `QInput.quantize` and `integer_product` give. Codes are multiplied by oneDNN where it does so
exactly, one row or many; elsewhere by `torch._int_mm`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from quantforge.numerics.blocks import extents
from quantforge.numerics.inputs import QInput
from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import Columns
from quantforge.runtime.int8 import OneDNN
from quantforge.runtime.integers import groups, input_codes, is_integer, spares, takes_inputs
from quantforge.runtime.kernel import nbytes

NAME, LLM_INT8 = "w8a8", "llm.int8"
_CUDA_ROWS = 32  # fewer than 17 rows, and numbers that are no multiple of 8, cuBLAS refuses


class Codes(Protocol):
    """Signed integers [out, in] that multiply others exactly."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""

    @property
    def nbytes(self) -> int:
        """Count the bytes of all that is held."""

    def product(self, x: Tensor) -> Tensor:
        """Return int8 `x` [tokens, in] times the codes → [tokens, out], integers in float32."""


class Plain:
    """Signed integers [out, in] as they are, multiplied by `torch._int_mm`."""

    def __init__(self, codes: Tensor) -> None:
        """Take `codes` [out, in] int8."""
        self.shape: tuple[int, int] = (codes.shape[0], codes.shape[1])
        self._codes = codes.contiguous()

    @property
    def nbytes(self) -> int:
        """Count a byte a code."""
        return self._codes.numel()

    def product(self, x: Tensor) -> Tensor:
        """Return int8 `x` [tokens, in] times the codes → [tokens, out], integers in float32."""
        short = -len(x) % _CUDA_ROWS if x.device.type == "cuda" else 0
        total = torch._int_mm(F.pad(x, (0, 0, 0, short)) if short else x, self._codes.T)
        return total[: len(x)].float()


def meant_for(weight: QWeight) -> bool:
    """Tell whether `weight` is of integers with a scale a row, and its layer rounds inputs."""
    q = weight.base
    return weight.inputs is not None and is_integer(q) and extents(q.shape, q.format.block)[1] == q.shape[1]


def refuses(weight: QWeight, device: str) -> str | None:
    """Return why no integer product computes a weight that it is meant for; None if one can."""
    q, rounds = weight.base, weight.inputs
    assert rounds is not None
    if q.zero is not None:
        return f"{q.format.short}: integer products take weights without zero points"
    if not takes_inputs(rounds.inputs):
        return f"inputs as {rounds.inputs} are no symmetric integers by token or by tensor"
    if device == "cuda" and (q.shape[0] % 8 or q.shape[1] % 8):
        return f"{q.shape[0]} x {q.shape[1]} are no multiples of 8"
    if not _fits_spared(weight):
        return "channels stay in float whose weights do not"
    return None


def _fits_spared(weight: QWeight) -> bool:
    """Tell whether the channels that stay in float are those whose weights do."""
    assert weight.inputs is not None
    spared = weight.inputs.spared
    kept = [r for r in weight.residuals if isinstance(r, Columns)]
    if spared is None or not len(spared):
        return not kept
    return len(kept) == 1 and torch.equal(kept[0].index.long(), spared.long())


@dataclass(frozen=True, eq=False)
class W8A8:
    """A weight for products with rounded inputs: codes, and scale [out] float32."""

    codes: Codes
    scale: Tensor
    rounds: QInput
    operator: str = field(default=NAME, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes and scales."""
        return self.codes.nbytes + nbytes((self.scale,))

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in], rounded, times the weight → [tokens, out]."""
        codes, scale = input_codes(x.float(), self.rounds)
        return self.codes.product(codes.to(torch.int8)).mul_(scale).mul_(self.scale).to(x.dtype)


@dataclass(frozen=True, eq=False)
class LLMInt8:
    """The same, with the channels in which an |x| reaches the threshold multiplied in float.

    index   [count] the channels, where calibration fixed them, and values [out, count] their float32 weights; None
            where they are found in each input, and have rounded weights
    """

    codes: Codes
    scale: Tensor
    rounds: QInput
    index: Tensor | None = None
    values: Tensor | None = None
    operator: str = field(default=LLM_INT8, init=False)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes, scales and weights in float."""
        return self.codes.nbytes + nbytes((self.scale, self.index, self.values))

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in], rounded but for those channels, times the weight → [tokens, out]."""
        wide = x.float()
        index = self.index
        if index is None and self.rounds.inputs.dynamic:
            index = (wide.abs() >= self.rounds.inputs.threshold).any(0).nonzero().flatten()
        if index is None or not len(index):
            codes, scale = input_codes(wide, self.rounds)
            return self.codes.product(codes.to(torch.int8)).mul_(scale).mul_(self.scale).to(x.dtype)
        codes, scale = self._codes_beside(wide, index)
        kept = wide[:, index]
        if self.values is not None:
            out = self.codes.product(codes.to(torch.int8)).mul_(scale).mul_(self.scale)
            return out.addmm_(kept, self.values.T).to(x.dtype)
        # rows of the identity fetch the columns of the codes, out of whatever layout they are in
        fetch = F.one_hot(index, x.shape[1])
        both = self.codes.product(torch.cat([codes.to(torch.int8), fetch.to(torch.int8)]))
        out, columns = both[: len(x)].mul_(scale), both[len(x) :]
        return out.addmm_(kept, columns).mul_(self.scale).to(x.dtype)

    def _codes_beside(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes of `x` [tokens, in] without the channels `index`, and their scale."""
        rest = x.index_fill(1, index, 0.0)
        # channels found anew count for the ranges with what of them is below the threshold
        if not self.rounds.inputs.dynamic:
            return input_codes(rest, self.rounds)
        low = x.masked_fill(x.abs() >= self.rounds.inputs.threshold, 0.0)
        codes, scale = input_codes(low, self.rounds)
        return codes.index_fill_(1, index, 0.0), scale


def pack(weight: QWeight, device: str, *, onednn: bool) -> W8A8 | LLMInt8:
    """Pack a weight that `refuses` takes, for oneDNN or for `torch._int_mm`."""
    assert weight.inputs is not None
    parts = groups(weight.base)
    codes: Codes = OneDNN(parts.codes) if onednn else Plain(parts.codes.to(device))
    scale = parts.scale[:, 0].to(device).contiguous()
    if not spares(weight):
        return W8A8(codes, scale, weight.inputs)
    kept = next((r for r in weight.residuals if isinstance(r, Columns)), None)
    if kept is None or weight.inputs.inputs.dynamic:
        return LLMInt8(codes, scale, weight.inputs)
    return LLMInt8(codes, scale, weight.inputs, kept.index.long().to(device), kept.values.float().to(device))
