"""NF4 and FP4 in blocks of 64: the products of bitsandbytes.

On a CPU it takes inputs and scales in bfloat16; on a GPU it multiplies a single token by the codes, and more of them by
float weights that it makes for each product.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from quantforge.exporters.bitsandbytes import Bitsandbytes
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import NAMED
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.numerics.ranges import plain_format
from quantforge.runtime.kernel import nbytes

NAME = "bitsandbytes 4-bit"
_FORMATS = tuple(NAMED[name] for name in ("nf4", "nf4-dq", "fp4", "fp4-dq"))
_ROWS = 32  # outputs that its layout takes together


def _tells(record: logging.LogRecord) -> bool:
    """Tell whether a line of bitsandbytes is of use: not that it did without a kernel that it wanted to download."""
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


@cache
def library() -> ModuleType | None:
    """Return `bitsandbytes` if it is installed."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.addFilter(_tells)
    try:
        import bitsandbytes
    except ImportError:
        return None
    finally:
        logger.removeFilter(_tells)
    found: ModuleType = bitsandbytes
    return found


def has_products(device: str) -> bool:
    """Tell whether bitsandbytes has 4-bit products of its own for `device`; on a CPU some processors lack them."""
    found = library()
    return found is not None and (device == "cuda" or bool(found.functional.has_avx512bf16()))


def meant_for(weight: QWeight) -> bool:
    """Tell whether `weight` is of a format of bitsandbytes."""
    return weight.base.format in _FORMATS


def refuses(weight: QWeight, device: str) -> str | None:
    """Return why bitsandbytes cannot compute with a weight of its format; None if it can."""
    q = weight.base
    assert isinstance(q.format.block, Flat)
    if weight.inputs is not None:
        return "bitsandbytes rounds no inputs beside 4-bit weights"
    rows = _ROWS if device == "cpu" else 1
    if q.shape[0] % rows or q.shape[1] % q.format.block.size:
        return f"{q.shape[0]} x {q.shape[1]} are no multiples of {rows} and {q.format.block.size}"
    return None


@dataclass(frozen=True, eq=False)
class Blocks4:
    """A weight as bitsandbytes takes it: packed codes, and its own state with scales and table."""

    shape: tuple[int, int]
    packed: Tensor
    state: Any
    operator: str = field(default=NAME, init=False)

    @property
    def nbytes(self) -> int:
        """Count the bytes of codes, scales and the table."""
        return nbytes((self.packed, self.state.absmax, self.state.code))

    def product(self, x: Tensor) -> Tensor:
        """Return x [tokens, in] times the weight → [tokens, out]."""
        found = library()
        assert found is not None
        taken = x.to(torch.bfloat16) if x.device.type == "cpu" else x
        out: Tensor = found.matmul_4bit(taken, self.packed, quant_state=self.state)
        return out.to(x.dtype)


def pack(weight: QWeight, device: str) -> Blocks4:
    """Pack a weight that `refuses` takes, in the library's layout; residuals beside its codes are left out."""
    found, q = library(), weight.base
    assert found is not None
    assert isinstance(q.format.block, Flat)
    stored = Bitsandbytes().tensors("w", QWeight(q, {}))
    state = found.functional.QuantState(
        absmax=_scale(q).flatten().to(device, copy=True),
        shape=torch.Size(q.shape),
        code=stored["w.weight.quant_map"].to(device),
        blocksize=q.format.block.size,
        quant_type=q.format.grid.name,
        dtype=torch.float32,  # of weights that are multiplied as floats, until they get the dtype of the inputs
    )
    packed = stored["w.weight"].to(device)
    if device == "cpu":
        packed, state = found.functional._convert_weight_packed_for_cpu(packed, state)
    return Blocks4(q.shape, packed, state)


def held(weight: QWeight) -> Tensor:
    """Return the float32 weight [out, in] that a CPU computes with: the table, scales and their product in bfloat16."""
    q, scale = weight.base, _scale(weight.base)
    assert isinstance(q.format.block, Flat)
    values = QTensor(plain_format(q.format), q.codes, torch.ones_like(scale)).dequantize(torch.bfloat16)
    blocks = values.view(-1, q.format.block.size) * scale.view(-1, 1).to(torch.bfloat16)
    return blocks.view(q.shape).float()


def _scale(q: QTensor) -> Tensor:
    return q.scale if isinstance(q.scale, Tensor) else q.scale.dequantize(torch.float32)
