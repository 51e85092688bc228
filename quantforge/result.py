"""What a quantization run hands back: the model, a row a layer, and how to keep it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantforge import exporters
from quantforge.errors import clean
from quantforge.exporters import peft
from quantforge.exporters.native import Native
from quantforge.models import moe
from quantforge.models.load import quiet
from quantforge.numerics.residuals import LowRank
from quantforge.plan import Plan, check_export
from quantforge.protocols import Exporter
from quantforge.solving import Layer
from quantforge.store import MARK, check_target, publish

MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Result:
    """A quantized model and what happened on the way.

    model        computes with the dequantized weights
    plan         what was asked for
    layers       a row a layer, in the order of the forward
    tokenizer    the model's, or None
    source       name of the float model
    calibration  where the calibration tokens came from; empty if none were used
    seconds      from the first forward to the last solve
    peak_memory  bytes above the loaded model, or None where it cannot be measured
    """

    model: nn.Module
    plan: Plan
    layers: tuple[Layer, ...]
    tokenizer: Any
    source: str
    calibration: dict[str, Any]
    seconds: float
    peak_memory: int | None

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per weight of the quantized layers, with scales, zero points, factors and floats counted."""
        weights = sum(p.shape[0] * p.shape[1] for p in self.plan.layers.values())
        return sum(layer.weight.nbits for layer in self.layers) / max(weights, 1)

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantized layers and of all that stays as it is, without what a container pads."""
        return self.plan.kept[1] + sum(-(-layer.weight.nbits // 8) for layer in self.layers)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write a checkpoint to `folder`, whole or not at all, in the first format that holds it; return the folder.

        Raises PlanError if the folder exists (unless `overwrite`) or the format cannot hold the model.
        """
        folder, exporter = Path(folder), exporters.choose(self._held_plan())
        check_export(self.plan, exporter)
        check_target(folder, overwrite=overwrite)
        with publish(folder, overwrite=overwrite) as staging:
            _write(self, exporter, staging)
        return folder

    def _held_plan(self) -> Plan:
        """Return the plan as it came out: a layer that no token reached finds its inputs' range anew."""
        found = {layer.name: layer.weight.inputs.inputs for layer in self.layers if layer.weight.inputs}
        return replace(self.plan, layers={n: replace(p, inputs=found.get(n)) for n, p in self.plan.layers.items()})

    def record(self) -> dict[str, Any]:
        """Return everything but the tensors, as plain JSON values; a loss that is not finite is None."""
        recipe = self.plan.recipe
        return {
            "schema": 1,
            "source": self.source,
            "method": recipe.name,
            "paper": recipe.paper,
            "format": str(recipe.weights.with_scale(self.plan.dtype)),
            "inputs": str(recipe.inputs) if recipe.inputs else None,
            "solver": repr(recipe.solver),
            "transforms": [repr(t) for t in recipe.transforms],
            "tuners": [repr(t) for t in recipe.tuners],
            "corrections": [repr(c) for c in recipe.corrections],
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.plan.bytes_before,
            "bytes_after": self.bytes_after,
            "calibration": self.calibration,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "notes": list(self.plan.notes),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.weight.base.shape),
                    "format": str(layer.weight.base.format),
                    **({"inputs": str(layer.weight.inputs.inputs)} if layer.weight.inputs else {}),
                    "bits_per_weight": layer.weight.nbits / layer.weight.base.codes.numel(),
                    "loss": _finite(layer.loss),
                    "relative_loss": _finite(layer.relative_loss),
                    "tokens": layer.tokens,
                    **{key: _finite(value) for key, value in layer.weight.notes.items()},
                }
                for layer in self.layers
            ],
        }

    def summary(self) -> str:
        """Return a few lines: the method, bits and bytes, time, the layers that lost most, and any fallback."""
        plan = self.plan
        worst = sorted(self.layers, key=lambda layer: -layer.relative_loss)[:3]
        memory = f", {self.peak_memory / 1e6:.0f} MB above the model" if self.peak_memory is not None else ""
        lines = [
            f"{self.source}: {plan.recipe.name}, {len(self.layers)} layers at {self.bits_per_weight:.3f} bits a weight",
            f"{plan.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB in {self.seconds:.1f} s{memory}",
            "most lost: " + ", ".join(f"{layer.name} {layer.relative_loss:.2%}" for layer in worst),
        ]
        notes = [f"note: {clean(note)}" for note in (*self.fallbacks(), *plan.notes)]
        return "\n".join([*lines, *notes])

    def fallbacks(self) -> list[str]:
        """Name the layers that could not be solved as asked: more damping, a diagonal Hessian, few tokens."""
        found = []
        every = max((layer.tokens for layer in self.layers), default=0)
        for layer in self.layers:
            notes, planned = layer.weight.notes, self.plan.layers[layer.name]
            asked = getattr(planned.solver, "damp_percent", None)
            if planned.needs and not layer.tokens:
                found.append(f"{layer.name} saw no calibration token and was rounded")
            elif planned.needs and moe.starved(layer.name, layer.tokens, planned.shape[1], every):
                found.append(f"{layer.name} saw only {layer.tokens:,} of {every:,} calibration tokens and was rounded")
            elif notes.get("rung") == "diagonal":
                found.append(f"{layer.name}: its Hessian could not be factored, and only its diagonal was used")
            elif notes.get("rounded"):
                found.append(f"{layer.name}: rounding lost less than the method, and was kept")
            elif "factors" in notes:
                found.append(f"{layer.name}: its low-rank correction is {notes['factors']}")
            elif asked is not None and "damp" in notes and notes["damp"] != asked:
                found.append(f"{layer.name}: damping was raised to {notes['damp']}")
        return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copy tensors to the CPU, floats in `dtype`; those that share memory share it again, so that ties are seen."""
    copies: dict[tuple[object, ...], Tensor] = {}
    result = {}
    for name, tensor in tensors.items():
        # where the memory begins is not enough: views of it differ in shape, and all empty tensors begin at 0
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        result[name] = copies[key]
    return result


def _write(result: Result, exporter: Exporter, staging: Path) -> None:
    """Write weights, configs, tokenizer and the record into `staging`; floats in the plan's dtype."""
    model, dtype = result.model, result.plan.dtype
    assert isinstance(model, PreTrainedModel)
    tensors = _in_dtype(model.state_dict(), dtype)
    for layer in result.layers:
        del tensors[f"{layer.name}.weight"]
        tensors |= {k: v.cpu() for k, v in exporter.tensors(layer.name, layer.weight).items()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears += moe.routers(model)  # linear layers to other loaders
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.quantization_config = exporter.config(result.plan, linears)
    factors = {layer.name: r for layer in result.layers for r in layer.weight.residuals if isinstance(r, LowRank)}
    if isinstance(exporter, Native):
        config.quantization_config["layers"] = {layer.name: exporter.describe(layer.weight) for layer in result.layers}
    elif factors:
        peft.write(staging / peft.FOLDER, factors, result.source)
    with quiet():
        before = model.config.dtype
        model.save_pretrained(staging, state_dict=tensors, max_shard_size=MAX_SHARD_SIZE)
        model.config.dtype = before
        config.save_pretrained(staging)
        if result.tokenizer is not None:
            result.tokenizer.save_pretrained(staging)
    record = {**result.record(), "files": sorted(p.name for p in staging.iterdir())}
    (staging / MARK).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
