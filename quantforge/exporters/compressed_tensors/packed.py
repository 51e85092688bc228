"""`pack-quantized`: integers of 2 to 8 bits, as many whole ones as fit into a 32-bit word.

    NAME.weight_packed      int32 [out, ⌈in / (32 // bits)⌉]
    NAME.weight_scale       floats [out, groups]
    NAME.weight_shape       int64 [2]
    NAME.weight_zero_point  int32 [⌈out / (32 // bits)⌉, groups], of asymmetric formats

Codes are packed by the compressed-tensors library itself, in the layout of the releases up to 0.17, which vLLM pins:
3-bit codes take 3.2 bits on disk, 5-bit codes 5.33, 6-bit codes 6.4 and 7-bit codes 8; 2, 4 and 8 bits are the same in
every release.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.numerics.blocks import counts
from quantforge.numerics.formats import SCALE_DTYPES, Format
from quantforge.numerics.qtensor import QTensor

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def tensors(q: QTensor) -> dict[str, Tensor]:
    """Return the parts of a layer's weight that stand in the file, by the last part of their names."""
    assert isinstance(q.scale, Tensor)
    bits, half = q.format.grid.bits, 1 << (q.format.grid.bits - 1)
    signed = (q.codes.to(torch.int16) - half).to(torch.int8)
    out = {
        "weight_packed": pack_to_int32(signed, bits),
        "weight_scale": q.scale.contiguous(),
        "weight_shape": torch.tensor(q.shape),
    }
    if isinstance(q.zero, Tensor):
        out["weight_zero_point"] = pack_to_int32(q.zero.contiguous(), bits, packed_dim=0)
    return out


def read(name: str, fmt: Format, parts: Mapping[str, Tensor | None]) -> QTensor:
    """Return the weight of the layer `name`; its scales' dtype is that of the tensor.

    Raises ModelError for parts that are missing or do not fit together, and for scales that are not above 0.
    """
    bits, symmetric = fmt.grid.bits, fmt.symmetric
    missing = [p for p in PARTS[: 3 if symmetric else 4] if parts[p] is None]
    if missing:
        raise ModelError(372, f"{name} lacks {', '.join(missing)}; the checkpoint is incomplete.")
    packed, scale, shape_tensor, zero_packed = (parts[p] for p in PARTS)
    assert packed is not None
    assert scale is not None
    assert shape_tensor is not None
    shape = tuple(shape_tensor.flatten().tolist()) if not shape_tensor.is_floating_point() else ()
    if len(shape) != 2 or min(shape) < 1 or shape_tensor.dim() != 1:
        raise ModelError(375, f"{name}.weight_shape is {shape_tensor.tolist()}, not the two sizes of a weight.")
    per_int = 32 // bits
    down, across = counts(shape, fmt.block)
    wanted = {"packed": (shape[0], -(-shape[1] // per_int)), "scale": (down, across)}
    found = {"packed": tuple(packed.shape), "scale": tuple(scale.shape)}
    fits = packed.dtype == torch.int32 and scale.dtype in SCALE_DTYPES.values()
    if not symmetric and zero_packed is not None:
        wanted["zero_point"], found["zero_point"] = (-(-down // per_int), across), tuple(zero_packed.shape)
        fits = fits and zero_packed.dtype == torch.int32
    if found != wanted or not fits:
        raise ModelError(373, f"{name}: {found} do not fit a weight of {shape} in {fmt}, which has {wanted}.")
    values = scale.float()
    if not ((values > 0) & values.isfinite()).all():
        raise ModelError(373, f"{name}.weight_scale holds scales that are not above 0 or no numbers; it is damaged.")
    zero = None
    if not symmetric and zero_packed is not None:
        zero = unpack_from_int32(zero_packed, bits, torch.Size((down, across)), packed_dim=0).contiguous()
    return QTensor(fmt.with_scale(scale.dtype), _codes(packed, bits, (shape[0], shape[1])), scale, zero)


def _codes(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Return the uint8 codes of a weight of `shape` from its words."""
    if bits == 4:  # a byte becomes two in three passes
        pairs = packed.contiguous().view(torch.uint8).to(torch.int16)
        codes = pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
        return codes[:, : shape[1]].contiguous()
    if bits in (2, 8):  # every byte holds whole codes, in their order: reading them so is twice as fast
        stored = packed.contiguous().view(torch.uint8)
        codes = torch.stack([(stored >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1)
        return codes.flatten(1)[:, : shape[1]].contiguous()
    signed: Tensor = unpack_from_int32(packed, bits, torch.Size(shape))
    return (signed.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
