"""AWQ's layout for its gemm kernels: 4 bits with zero points, which vLLM loads, and transformers where gptqmodel is.

A weight X of [out, in] stands as

    X.qweight  int32 [in, out / 8], codes from 0 packed along the output
    X.qzeros   int32 [groups, out / 8], zero points from 0, packed alike
    X.scales   float16 [groups, out]

and a word holds, from its low bits on, the columns 0, 2, 4, 6, 1, 3, 5, 7 of eight. Any method may have chosen the
codes; that of AWQ is one. Layers that stay in float are in `modules_to_not_convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.exporters import words
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import int_grid
from quantforge.numerics.problem import QWeight
from quantforge.plan import Plan
from quantforge.registry import register

_BITS, _HALF = 4, 8
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FORMAT = Format(int_grid(_BITS), (1, None))
_WORKS = "int4 by group or channel with zero points works (gptq holds 4 and 8 bits without them)."


@register("exporter", "awq")
@dataclass(frozen=True)
class Awq:
    """Checkpoints in the layout of AWQ, version gemm, as AutoAWQ writes them."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether `plan` can be held."""
        return self.refuses(plan) is None

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, or loaded, and what could; None if it can."""
        return words.refuses(plan, "awq", (_FORMAT,), _WORKS)

    def fix(self, fmt: Format) -> Format:
        """Return `fmt` with zero points, if it is 4 bits by group or channel."""
        return replace(fmt, symmetric=False) if fmt.grid == _FORMAT.grid and isinstance(fmt.block, tuple) else fmt

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Return float16 for floats and scales, whatever the model's own dtype."""
        return torch.float16, torch.float16

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name; factors stand elsewhere."""
        q = weight.base
        assert isinstance(q.scale, Tensor)
        assert isinstance(q.zero, Tensor)
        parts = {
            "qweight": _pack(q.codes.T),
            "qzeros": _pack((q.zero.T + _HALF).to(torch.uint8)),
            "scales": q.scale.T.contiguous(),
        }
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`; `linears` that the plan leaves alone are listed in it."""
        fmt = next(iter(plan.layers.values())).format
        return {
            "quant_method": "awq",
            "bits": _BITS,
            "group_size": words.group_of(fmt),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": [name for name in linears if name not in plan.layers],
        }

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`, all those of a checkpoint.

        Raises ModelError for another version, and for tensors that are missing or do not fit together.
        """
        told = tuple(config.get(key) for key in ("quant_method", "bits", "version", "zero_point"))
        if told != ("awq", _BITS, "gemm", True):
            raise ModelError(
                382,
                f"the checkpoint is in {told[0]} of {told[1]!r} bits, version {told[2]}, zero_point {told[3]}; "
                "quantforge reads awq of 4 bits, version gemm, with zero points.",
            )
        size = words.read_group(config, "awq")
        fmt = replace(_FORMAT, block=(1, size))
        layers = {}
        for name, parts in words.take(tensors, words.PARTS, "qweight").items():
            codes, zero = _codes(name, size, parts)
            layers[name] = QWeight(words.matrix(fmt, codes, parts["scales"], zero), {})
        return layers


def _pack(codes: Tensor) -> Tensor:
    """Return codes [rows, cols] uint8 as words [rows, cols / 8], in AWQ's order."""
    return words.pack(codes.reshape(len(codes), -1, 8)[..., _ORDER].flatten(1), _BITS)


def _unpack(packed: Tensor) -> Tensor:
    back = torch.tensor(_ORDER).argsort()
    return words.unpack(packed, _BITS).view(len(packed), -1, 8)[..., back].flatten(1)


def _codes(name: str, size: int | None, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the codes [out, in] and zero points [out, groups] of one layer, its tensors checked against each other."""
    packed = parts["qweight"]
    if packed.dim() != 2 or packed.dtype != torch.int32 or not packed.numel():
        raise ModelError(384, f"{name}.qweight is {packed.dtype} {list(packed.shape)}, no matrix of int32.")
    width, out = packed.shape[0], packed.shape[1] * 8
    if width % (size or 1):
        raise ModelError(384, f"{name} is {out} x {width}, which groups of {size} do not fit.")
    groups = width // (size or width)
    words.check(name, parts, {"qzeros": (groups, out // 8), "scales": (groups, out)})
    zero = (_unpack(parts["qzeros"]).to(torch.int8) - _HALF).T.contiguous()
    return _unpack(packed).T, zero
