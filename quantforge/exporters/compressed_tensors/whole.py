"""`int-quantized` and `float-quantized`: a byte a weight, int8 or E4M3, symmetric.

NAME.weight        int8 or float8_e4m3fn [out, in]
NAME.weight_scale  floats [out, groups], [out, 1], [row blocks, column blocks], or [1] for the whole tensor
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.numerics.blocks import counts, extents
from quantforge.numerics.formats import SCALE_DTYPES, Format
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.qtensor import QTensor

PARTS = ("weight", "weight_scale")
DTYPES = (torch.int8, torch.float8_e4m3fn)  # no weight in float has one of them


def fits(shape: tuple[int, int], fmt: Format) -> bool:
    """Tell whether stock transformers, which finds blocks from shapes alone, sees those of `fmt`."""
    assert isinstance(fmt.block, tuple)
    if fmt.block[0] in (1, None):
        return shape[1] % (fmt.block[1] or 1) == 0
    (down, across), (rows, cols) = counts(shape, fmt.block), extents(shape, fmt.block)
    # one column of blocks is taken for a scale a row, and a short last block for all of them being shorter
    return (down == 1 or (across > 1 and shape[0] % rows == 0)) and (across == 1 or shape[1] % cols == 0)


def tensors(q: QTensor) -> dict[str, Tensor]:
    """Return the parts of a layer's weight that stand in the file, by the last part of their names."""
    assert isinstance(q.scale, Tensor)
    scale = q.scale.reshape(1) if q.format.block == (None, None) else q.scale.contiguous()
    return {"weight": q.format.grid.decode(q.codes).to(_dtype(q.format)), "weight_scale": scale}


def read(name: str, fmt: Format, parts: Mapping[str, Tensor | None]) -> QTensor:
    """Return the weight of the layer `name`; its scales' dtype is that of the tensor.

    Raises ModelError for parts that are missing or do not fit together, and for codes and scales that are no numbers.
    """
    missing = [p for p in PARTS if parts[p] is None]
    if missing:
        raise ModelError(372, f"{name} lacks {', '.join(missing)}; the checkpoint is incomplete.")
    weight, scale = (parts[p] for p in PARTS)
    assert weight is not None
    assert scale is not None
    if weight.dtype != _dtype(fmt) or weight.dim() != 2 or not weight.numel():
        raise ModelError(373, f"{name}.weight is {weight.dtype} {tuple(weight.shape)}, not a weight in {fmt}.")
    shape = (weight.shape[0], weight.shape[1])
    blocks = counts(shape, fmt.block)
    wanted = (1,) if fmt.block == (None, None) else blocks
    if tuple(scale.shape) != wanted or scale.dtype not in SCALE_DTYPES.values() or not fits(shape, fmt):
        found = f"{scale.dtype} {tuple(scale.shape)}"
        raise ModelError(373, f"{name}.weight_scale is {found}, which does not fit a weight of {shape} in {fmt}.")
    values = weight.float()
    if not values.isfinite().all() or not ((scale > 0) & scale.isfinite()).all():
        raise ModelError(373, f"{name} holds weights that are no numbers, or scales not above 0; it is damaged.")
    codes = fmt.grid.encode(values)
    return QTensor(fmt.with_scale(scale.dtype), codes, scale.reshape(blocks))


def _dtype(fmt: Format) -> torch.dtype:
    return DTYPES[0] if isinstance(fmt.grid, IntGrid) else DTYPES[1]
