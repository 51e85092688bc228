"""GPTQ's layout, version 1: symmetric 4 and 8 bits, for vLLM (8 on GPUs only), and transformers where gptqmodel is.

A weight X of [out, in] stands as

    X.qweight  int32 [in · bits / 32, out], codes from 0 packed along the input, the first in the low bits
    X.qzeros   int32 [groups, out · bits / 32], packed along the output: the zero point less 1, in all of them 7 or 127
    X.scales   float16 [groups, out]
    X.g_idx    int32 [in], the group of each input: i // group size

Zero points other than the middle are not written: version 1 stores them less 1, which loses some, and vLLM takes none.
Layers of a block that stay in float are told twice: `modules_in_block_to_quantize` names those that do not, for
transformers and vLLM, and `dynamic` those that do, for gptqmodel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.exporters import words
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import IntGrid, int_grid
from quantforge.numerics.problem import QWeight
from quantforge.plan import Plan
from quantforge.registry import register

FILE = "quantize_config.json"  # where loaders looked before config.json told
WITHOUT = "-:"  # before a pattern in `dynamic`: the layers that match it stay in float
_FORMATS = {bits: Format(int_grid(bits), (1, None), symmetric=True) for bits in (4, 8)}
_WORKS = "int4 and int8 by group or channel without zero points work (awq holds 4 bits with them)."
_PARTS = (*words.PARTS, "g_idx")


@register("exporter", "gptq")
@dataclass(frozen=True)
class Gptq:
    """Checkpoints in the layout of GPTQ, as AutoGPTQ and GPTQModel write them."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether `plan` can be held."""
        return self.refuses(plan) is None

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, or loaded, and what could; None if it can."""
        return words.refuses(plan, "gptq", tuple(_FORMATS.values()), _WORKS)

    def fix(self, fmt: Format) -> Format:
        """Return `fmt` without zero points, if it has plain integer ones."""
        plain = isinstance(fmt.grid, IntGrid) and isinstance(fmt.block, tuple) and fmt.zero is None
        return replace(fmt, symmetric=True) if plain else fmt

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
        """Return float16 for floats and scales, whatever the model's own dtype."""
        return torch.float16, torch.float16

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name; factors stand elsewhere."""
        q = weight.base
        assert isinstance(q.scale, Tensor)
        bits, groups = q.format.grid.bits, q.scale.shape[1]
        middle = torch.full((groups, q.shape[0]), (1 << (bits - 1)) - 1, dtype=torch.uint8)
        parts = {
            "qweight": words.pack(q.codes, bits).T.contiguous(),
            "qzeros": words.pack(middle, bits),
            "scales": q.scale.T.contiguous(),
            "g_idx": _group_index(q.shape[1], groups),
        }
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`; layers of decoder blocks that the plan leaves alone are told in it."""
        fmt = next(iter(plan.layers.values())).format
        found: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": fmt.grid.bits,
            "group_size": words.group_of(fmt),
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"quantforge:{version('quantforge')}"]},
        }
        if plan.floats:
            found["modules_in_block_to_quantize"] = [list(plan.layers)]
            found["dynamic"] = {f"{WITHOUT}^{re.escape(name)}$": {} for name in plan.floats}
        return found

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`, all those of a checkpoint.

        Raises ModelError for another version or order of inputs, for zero points that are not the middle, and for
        tensors that are missing or do not fit together.
        """
        bits = config.get("bits")
        known = config.get("checkpoint_format", "gptq") == "gptq" and config.get("desc_act", False) is False
        if config.get("quant_method") != "gptq" or type(bits) is not int or bits not in _FORMATS or not known:
            raise ModelError(
                382,
                f"the checkpoint is in {config.get('quant_method')} / {config.get('checkpoint_format')} of {bits!r} "
                f"bits with desc_act {config.get('desc_act')}; quantforge reads gptq / gptq of 4 and 8 without it.",
            )
        patterns = config.get("dynamic") or {}
        other = next((p for p in patterns if not (isinstance(patterns, Mapping) and p.startswith(WITHOUT))), None)
        if other is not None:
            raise ModelError(382, f"dynamic gives layers like {other!r} another format; quantforge reads one a model.")
        size = words.read_group(config, "gptq")
        fmt = replace(_FORMATS[bits], block=(1, size))
        layers = {}
        for name, parts in words.take(tensors, _PARTS, "qweight").items():
            layers[name] = QWeight(words.matrix(fmt, _codes(name, bits, size, parts), parts["scales"]), {})
        return layers


def _group_index(width: int, groups: int) -> Tensor:
    return (torch.arange(width) // (width // groups)).to(torch.int32)


def _codes(name: str, bits: int, size: int | None, parts: Mapping[str, Tensor]) -> Tensor:
    """Return the codes [out, in] of one layer, its tensors checked against each other."""
    packed = parts["qweight"]
    if packed.dim() != 2 or packed.dtype != torch.int32:
        raise ModelError(384, f"{name}.qweight is {packed.dtype} {list(packed.shape)}, no matrix of int32.")
    per = 32 // bits
    width, out = packed.shape[0] * per, packed.shape[1]
    if not packed.numel() or out % per or width % (size or 1):
        raise ModelError(384, f"{name} is {out} x {width}, which groups of {size or width} in {bits} bits do not fit.")
    groups = width // (size or width)
    words.check(name, parts, {"qzeros": (groups, out // per), "scales": (groups, out), "g_idx": (width,)})
    if not (words.unpack(parts["qzeros"], bits) == (1 << (bits - 1)) - 1).all():
        raise ModelError(395, f"{name} has zero points other than the middle, which gptq's layout may not; awq's may.")
    if not torch.equal(parts["g_idx"], _group_index(width, groups)):
        raise ModelError(395, f"{name}.g_idx orders the inputs anew (desc_act), which quantforge does not read.")
    return words.unpack(packed.T, bits)
