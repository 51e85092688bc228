"""What operators on integers are made from: weights as signed codes with a scale a group, inputs as codes a token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantforge.numerics.blocks import extents, spread, within_rows
from quantforge.numerics.formats import E8M0
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.inputs import Inputs, QInput
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor, fit


@dataclass(frozen=True)
class Groups:
    """An integer weight [out, in]: scale · code + offset, in groups along the input.

    codes   [out, in] int8
    scale   [out, groups] float32
    offset  the same, or None where it is 0
    size    inputs of a group; the last may be short
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    size: int


def is_integer(q: QTensor) -> bool:
    """Tell whether `groups` can take `q` apart."""
    return isinstance(q.format.grid, IntGrid) and within_rows(q.shape, q.format.block) is not None and q.offset is None


def groups(q: QTensor) -> Groups:
    """Take a matrix of an integer format apart; scales that are quantized themselves become float32."""
    assert is_integer(q)
    high, size = extents(q.shape, q.format.block)
    scale = _by_row(q.scale, q.shape[0], high)
    low = int(q.format.grid.low)
    offset = None if q.zero is None else _by_row(q.zero, q.shape[0], high)
    if offset is not None:
        offset = offset - low * scale if q.format.minimum else offset * -scale
    # modulo 256, in which the highest code of 8 bits is 127 too
    return Groups(q.codes.view(torch.int8) + low, scale, offset, size)


def _by_row(part: Tensor | QTensor, rows: int, high: int) -> Tensor:
    """Return values of blocks of `high` rows as float32, a row each."""
    dense = part.dequantize(torch.float32) if isinstance(part, QTensor) else part.float()
    return spread(dense, (rows, dense.shape[1]), (high, 1)) if len(dense) != rows else dense


def takes_inputs(inputs: Inputs) -> bool:
    """Tell whether `input_codes` rounds as `inputs` say: symmetric integers of at most 8 bits, by token or tensor."""
    fmt = inputs.format
    plain = isinstance(fmt.grid, IntGrid) and fmt.symmetric and fmt.scale != E8M0
    return plain and fmt.block in ((1, None), (None, None))


def spares(weight: QWeight) -> bool:
    """Tell whether channels of the inputs of `weight` stay in float."""
    return weight.inputs is not None and math.isfinite(weight.inputs.inputs.threshold)


def input_codes(x: Tensor, rounds: QInput) -> tuple[Tensor, Tensor]:
    """Return float32 `x` [tokens, in] as codes, integers in float32, and their scale [tokens or 1, 1].

    The same codes and products as of `QInput.quantize`, in fewer passes; channels that stay in float are not told
    apart. A token of zeros has the smallest scale in place of 1.
    """
    fmt = rounds.inputs.format
    if rounds.range is not None:
        scale = rounds.range.scale.to(x.device)
    elif fmt.scale == torch.float32:
        largest = x.abs().amax(1, keepdim=True)  # a norm would take ten times as long
        if fmt.block == (None, None):
            largest = largest.amax(0, keepdim=True)
        limits = torch.finfo(torch.float32)
        # 2 m / steps = m / (steps / 2), exactly
        scale = largest.div_((fmt.grid.high - fmt.grid.low) / 2).clamp_(limits.tiny, limits.max)
    else:
        scale = fit(x, fmt).scale
    return (x / scale).round_().clamp_(fmt.grid.low, fmt.grid.high), scale
