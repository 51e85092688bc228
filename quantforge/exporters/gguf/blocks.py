"""The blocks of GGUF's Q4_0, Q4_1 and Q8_0: 32 weights of a row with their scale, and the minimum of Q4_1.

A block is bytes in this order: the scale in float16; of Q4_1 the minimum in float16; then the codes. Those of 4 bits,
counted from the lowest, stand two a byte, those of weights 0 to 15 in the low halves and of 16 to 31 in the high ones;
those of 8 bits are int8. Weights are scale · code, scale · (code − 8) in Q4_0, and scale · code + minimum in Q4_1.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from quantforge.numerics.formats import Format, parse
from quantforge.numerics.qtensor import QTensor

BLOCK = 32
FORMATS = {
    GGMLQuantizationType.Q4_0: parse("int4-g32-sym-fp16"),
    GGMLQuantizationType.Q4_1: parse("int4-g32-asym-fp16-min-fp16"),
    GGMLQuantizationType.Q8_0: parse("int8-g32-sym-fp16"),
}


def kind(fmt: Format) -> GGMLQuantizationType | None:
    """Return the type whose blocks are `fmt`, or None."""
    return next((name for name, held in FORMATS.items() if held == fmt), None)


def pack(q: QTensor) -> np.ndarray:
    """Return the bytes of `q` [rows, cols] → uint8 [rows, bytes of a row]; its codes are packed as they are."""
    rows, cols = q.shape
    assert kind(q.format) is not None
    assert cols % BLOCK == 0
    blocks = q.codes.cpu().view(rows, cols // BLOCK, BLOCK)
    codes = blocks ^ 0x80 if q.format.grid.bits == 8 else blocks[..., :16] | (blocks[..., 16:] << 4)
    parts = [part.cpu() for part in (q.scale, q.zero) if isinstance(part, Tensor)]
    heads = [part.contiguous()[..., None].view(torch.uint8) for part in parts]
    return torch.cat([*heads, codes], -1).reshape(rows, -1).numpy()


def unpack(raw: np.ndarray, held: GGMLQuantizationType) -> QTensor:
    """Return the matrix whose bytes `pack` gave; ValueError for other bytes, and for scales that it does not write."""
    fmt = FORMATS[held]
    size = 2 + 2 * fmt.minimum + BLOCK * fmt.grid.bits // 8
    if raw.ndim != 2 or raw.dtype != np.uint8 or raw.shape[1] % size or not raw.size:
        raise ValueError(f"its bytes {list(raw.shape)} are no rows of {held.name}, whose blocks have {size}")
    blocks = torch.from_numpy(raw.copy()).view(raw.shape[0], -1, size)
    parts = [blocks[..., i : i + 2].contiguous().view(torch.float16)[..., 0] for i in range(0, 2 + 2 * fmt.minimum, 2)]
    if not all(part.isfinite().all() for part in parts) or not (parts[0] > 0).all():
        raise ValueError("its scales are not all finite and above 0")
    packed = blocks[..., 2 * len(parts) :]
    codes = packed ^ 0x80 if fmt.grid.bits == 8 else torch.cat([packed & 15, packed >> 4], -1)
    return QTensor(fmt, codes.reshape(raw.shape[0], -1), parts[0], parts[1] if fmt.minimum else None)
