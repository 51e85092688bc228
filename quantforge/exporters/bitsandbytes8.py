"""bitsandbytes 8-bit: LLM.int8() as that library computes it, which stock transformers loads where it is installed.

A weight X of [out, in] stands as

    X.weight         int8 [out, in]
    X.SCB            float32 [out], the largest |w| of each row: w = code · SCB / 127
    X.weight_format  uint8, 0: row after row

Which input channels stay in float is found anew in every input, and their weights are the rounded ones. The library
first casts the inputs to float16; quantforge does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.models import moe
from quantforge.numerics.formats import NAMED, Format
from quantforge.numerics.inputs import Inputs, QInput, parse_inputs
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor
from quantforge.plan import Plan
from quantforge.registry import register

_FORMAT, _INPUTS = NAMED["llm-int8"], parse_inputs("narrow8-token")


@register("exporter", "bitsandbytes8")
@dataclass(frozen=True)
class Bitsandbytes8:
    """8-bit checkpoints of the bitsandbytes library, for LLM.int8() with features found anew in every input."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether all of `plan` is LLM.int8() as the library computes it."""
        return bool(plan.layers) and self.refuses(plan) is None

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, and what could; None if it can."""
        asked = {p.inputs for p in plan.layers.values()}
        if plan.recipe.tuners:
            return "bitsandbytes' 8 bits hold the largest weight of a row as its scale, no trained one; native can."
        for p in plan.layers.values():
            plain = p.inputs is not None and replace(p.inputs, threshold=math.inf, dynamic=False) == _INPUTS
            if p.format != _FORMAT or not plain or p.solver.extends_format or p.corrections or p.transposed:
                return f"bitsandbytes' 8 bits cannot hold {p.name} ({p.format} x {p.inputs}); native can."
            if p.inputs is not None and math.isfinite(p.inputs.threshold) and not p.inputs.dynamic:
                return (
                    f"bitsandbytes finds outlier features anew, and those of {p.name} are fixed; native can hold them."
                )
            # of another scale, 127 times and a 127th does not always come back
            found = getattr(p.solver, "range", "minmax")
            if found != "minmax":
                return f"bitsandbytes' 8 bits hold no scales found by {found}, as those of {p.name}; minmax works."
            if moe.expert_of(p.name) or len(asked) > 1:
                return f"bitsandbytes' 8 bits hold nn.Linear with one threshold a model, not {p.name}; native can."
        return None

    def fix(self, fmt: Format) -> Format:
        """Return `fmt` as it is."""
        return fmt

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """Return the model's own dtype for floats; scales may have any."""
        return own, None

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name."""
        q = weight.base
        assert isinstance(q.scale, Tensor)
        return {
            f"{name}.weight": q.format.grid.decode(q.codes).to(torch.int8),
            f"{name}.SCB": (q.scale[:, 0].double() * 127).float(),
            f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
        }

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`; `linears` that the plan leaves alone are listed to be skipped."""
        inputs = next(iter(plan.layers.values())).inputs
        assert inputs is not None
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": False,
            "load_in_8bit": True,
            "llm_int8_threshold": inputs.threshold if math.isfinite(inputs.threshold) else 0.0,  # 0 means none
            "llm_int8_skip_modules": [name for name in linears if name not in plan.layers],
        }

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`; ModelError if damaged."""
        threshold = config.get("llm_int8_threshold", 6.0)
        if type(threshold) not in (int, float) or not 0 <= threshold < math.inf:
            raise ModelError(385, f"llm_int8_threshold must be a number of at least 0, not {threshold!r}.")
        spares = {"threshold": float(threshold), "dynamic": True} if threshold else {}
        rounds = QInput(Inputs(_INPUTS.format, **spares))  # type: ignore[arg-type]
        layers = {}
        for key in [key for key in tensors if key.endswith(".SCB")]:
            name = key.removesuffix(".SCB")
            codes, largest = tensors.pop(f"{name}.weight", None), tensors.pop(key)
            order = tensors.pop(f"{name}.weight_format", torch.zeros(()))  # the library takes none for row after row
            if codes is None or codes.dtype != torch.int8 or codes.dim() != 2 or largest.shape != codes.shape[:1]:
                raise ModelError(386, f"{name} lacks its int8 weight, or a number a row in SCB; it is incomplete.")
            if order.numel() != 1 or order.item() != 0:
                raise ModelError(394, f"{name}.weight_format is {order.tolist()}; quantforge reads 0, row after row.")
            sound = largest.dtype == torch.float32 and bool((largest.isfinite() & (largest >= 0)).all())
            if not sound or not codes.numel() or int(codes.min()) < -127:
                raise ModelError(389, f"{name}: SCB or codes are out of range; the checkpoint is damaged.")
            scale = torch.where(largest > 0, largest.double() / 127, 1.0).float()[:, None]
            base = QTensor(_FORMAT, _FORMAT.grid.encode(codes.float()), scale)
            layers[name] = QWeight(base, {}, (), rounds)
        return layers
