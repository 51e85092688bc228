"""`mxfp4-pack-quantized` and `nvfp4-pack-quantized`: E2M1, two codes a byte, the first in the low nibble.

    NAME.weight_packed        uint8 [out, in / 2]: a sign bit and the index of 0, 0.5, 1, 1.5, 2, 3, 4, 6
    NAME.weight_scale         MXFP4: uint8 [out, in / 32], exponents of powers of two with a bias of 127;
                              NVFP4: float8_e4m3fn [out, in / 16]
    NAME.weight_global_scale  NVFP4: float32 [1], the reciprocal of what all scales are multiplied by

Layers that read one input are solved together and have one global scale: vLLM puts q, k and v, and gate and up,
together as it reads, and takes the largest of what stands in the file for all of them. Where an override or a
correction parts them, they may differ, and vLLM would compute with other weights than these.

The reciprocal of a float32 number does not always come back: one in six is off by its last bit. Powers of two do, and
with one as its global scale an NVFP4 weight is the same number in every loader, in bfloat16 too; others are read, but
not written.

compressed-tensors computes these weights in bfloat16 whatever the model is in, so stock transformers runs the
checkpoints in bfloat16 only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.numerics.formats import E8M0, NAMED, Format
from quantforge.numerics.grids import minifloat
from quantforge.numerics.qtensor import QTensor

PARTS = ("weight_packed", "weight_scale", "weight_global_scale")
MXFP4 = NAMED["mxfp4"]
NVFP4 = Format(minifloat(2, 1), (1, 16), True, Format(minifloat(4, 3), (None, None), True, E8M0))
_CODES = tuple(7 - n % 8 if n > 7 else 7 + n for n in range(16))  # of each nibble; the two zeros are one code
_NIBBLES = tuple(8 + 7 - code if code < 7 else code - 7 for code in range(15))


def tensors(q: QTensor) -> dict[str, Tensor]:
    """Return the parts of a layer's weight that stand in the file, by the last part of their names."""
    nibbles = torch.tensor(_NIBBLES, dtype=torch.uint8, device=q.codes.device)[q.codes.long()]
    out = {"weight_packed": nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)}
    if isinstance(q.scale, Tensor):
        return {**out, "weight_scale": q.scale.contiguous().view(torch.uint8)}
    assert isinstance(q.scale.scale, Tensor)
    values = q.scale.format.grid.decode(q.scale.codes)
    whole = q.scale.scale.float().reciprocal().reshape(1)
    return {**out, "weight_scale": values.to(torch.float8_e4m3fn), "weight_global_scale": whole}


def read(name: str, fmt: Format, parts: Mapping[str, Tensor | None]) -> QTensor:
    """Return the weight of the layer `name`, whose format is MXFP4 or NVFP4.

    Raises ModelError for parts that are missing or do not fit together, and for scales that are no numbers.
    """
    nested = isinstance(fmt.scale, Format)
    missing = [p for p in PARTS[: 3 if nested else 2] if parts[p] is None]
    if missing:
        raise ModelError(372, f"{name} lacks {', '.join(missing)}; the checkpoint is incomplete.")
    packed, scale, whole = (parts[p] for p in PARTS)
    assert packed is not None
    assert scale is not None
    assert isinstance(fmt.block, tuple)
    assert fmt.block[1] is not None
    if packed.dtype != torch.uint8 or packed.dim() != 2 or not packed.numel() or packed.shape[1] * 2 % fmt.block[1]:
        raise ModelError(
            373,
            f"{name}.weight_packed is {packed.dtype} {tuple(packed.shape)}, which is no weight in {fmt}.",
        )
    wanted = (packed.shape[0], packed.shape[1] * 2 // fmt.block[1])
    if tuple(scale.shape) != wanted or scale.dtype != (torch.float8_e4m3fn if nested else torch.uint8):
        found = f"{scale.dtype} {tuple(scale.shape)}"
        raise ModelError(373, f"{name}.weight_scale is {found}, which does not fit {wanted} scales in {fmt}.")
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).view(packed.shape[0], -1)
    codes = torch.tensor(_CODES, dtype=torch.uint8)[nibbles.long()]
    if not nested:
        exponents = scale.view(E8M0)
        if not exponents.float().isfinite().all():
            raise ModelError(373, f"{name}.weight_scale holds scales that are no numbers; it is damaged.")
        return QTensor(fmt, codes, exponents)
    assert whole is not None
    values = scale.float()
    if whole.shape != (1,) or whole.dtype != torch.float32 or not _usable(whole) or not _usable(whole.reciprocal()):
        raise ModelError(373, f"{name}.weight_global_scale is no float32 number above 0; the checkpoint is damaged.")
    if not (values >= 0).all():  # false for NaN too
        raise ModelError(373, f"{name}.weight_scale holds scales that are negative or no numbers; it is damaged.")
    return _nested(fmt, codes, values, whole.reciprocal().view(1, 1))


def _usable(x: Tensor) -> bool:
    return bool((x > 0).all() and x.isfinite().all())


def _nested(fmt: Format, codes: Tensor, values: Tensor, whole: Tensor) -> QTensor:
    """Return a weight whose scales are `values` times `whole`: in NVFP4 as above, or with a global scale in float32."""
    assert isinstance(fmt.scale, Format)
    kept = E8M0 if torch.equal(torch.frexp(whole)[0], torch.full_like(whole, 0.5)) else torch.float32
    inner = replace(fmt.scale, scale=kept)
    scale = QTensor(inner, inner.grid.encode(values), whole.to(kept))
    return QTensor(replace(fmt, scale=inner), codes, scale)
