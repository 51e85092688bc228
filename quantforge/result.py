"""What a quantization run hands back: the model, a row a layer, and how to keep it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from quantforge import digests, exporters, fallbacks, shards, stored, verification
from quantforge.errors import PlanError, clean
from quantforge.exporters import gptq, peft
from quantforge.exporters.gptq import Gptq
from quantforge.exporters.native import Native
from quantforge.models import moe
from quantforge.models.blocks import Blocks
from quantforge.models.load import quiet
from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import LowRank
from quantforge.plan import Plan
from quantforge.protocols import Exporter, FileExporter
from quantforge.solving import Layer, UnreadWeight
from quantforge.store import MARK, check_target, publish, write_text
from quantforge.verification.report import Loader

MAX_SHARD_SIZE = shards.LIMIT
MEASURED = ("seconds", "peak_memory")  # what a run never gives twice, and no checkpoint holds


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
    made_of      digests and versions of all that the result depends on; empty if they were not taken
    command      the command line that made it; "" if there was none
    blocks       of a model that was never in memory as a whole: `model` has no weights in its decoder blocks then, and
                 those of `layers` can be read only until the run that made them is over; None: all is in memory
    loaders      what software takes the checkpoint that was saved last; empty before
    """

    model: nn.Module
    plan: Plan
    layers: tuple[Layer, ...]
    tokenizer: Any
    source: str
    calibration: dict[str, Any]
    seconds: float
    peak_memory: int | None
    made_of: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    blocks: Blocks | None = None
    loaders: list[Loader] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits per weight of the quantized layers, with scales, zero points, factors and floats counted."""
        weights = sum(p.shape[0] * p.shape[1] for p in self.plan.layers.values())
        return sum(layer.weight.nbits for layer in self.layers) / max(weights, 1)

    @property
    def bytes_after(self) -> int:
        """Bytes of the quantized layers and of all that stays as it is, without what a container pads."""
        return self.plan.kept[1] + sum(-(-layer.weight.nbits // 8) for layer in self.layers)

    def save(
        self,
        folder: str | Path,
        format: str | None = None,
        *,
        overwrite: bool = False,
        sealed: Callable[[Path], None] = lambda staging: None,
    ) -> Path:
        """Write a checkpoint to `folder`, whole or not at all; return the folder.

        format  "compressed-tensors", "gptq", …; None: the one that it was quantized for, or the first that holds it
        sealed  called with the folder in which all of it stands, before that takes its name

        Raises PlanError if the folder exists (unless `overwrite`) or the format cannot hold the model.
        """
        if format is not None:
            exporters.named(format)  # which knows the names
        folder, exporter = Path(folder), exporters.choose(self._held_plan(), format)
        exporters.check(self.plan, exporter)
        if format is not None or self.plan.container:
            check_fit(self.model, self.plan)
        check_target(folder, overwrite=overwrite)
        with publish(folder, overwrite=overwrite) as staging:
            _write(self, exporter, staging)
            # code of the model's own is not there yet
            if stored.reads(exporter) and not getattr(self.model.config, "auto_map", None):
                self.loaders[:] = verification.require(staging, folder).loaders
            sealed(staging)
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
            "format": str(recipe.weights.with_scale(self.plan.scales or self.plan.dtype)),
            "inputs": str(recipe.inputs) if recipe.inputs else None,
            "solver": repr(recipe.solver),
            "transforms": [repr(t) for t in recipe.transforms],
            "tuners": [repr(t) for t in recipe.tuners],
            "corrections": [repr(c) for c in recipe.corrections],
            "bits_per_weight": self.bits_per_weight,
            "bytes_before": self.plan.bytes_before,
            "bytes_after": self.bytes_after,
            "calibration": self.calibration,
            "made_of": dict(self.made_of),
            "command": self.command,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "notes": [*fallbacks.remarks(self.plan, self.layers), *self.plan.notes],
            "fallbacks": self.fallbacks(),
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "format": str(layer.format),
                    **({"inputs": str(layer.weight.inputs.inputs)} if layer.weight.inputs else {}),
                    "bits_per_weight": layer.weight.nbits / math.prod(layer.shape),
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
        took = f" in {self.seconds:.1f} s{memory}" if self.seconds else ""  # a checkpoint does not keep it
        lines = [
            f"{self.source}: {plan.recipe.name}, {len(self.layers)} layers at {self.bits_per_weight:.3f} bits a weight",
            f"{plan.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB{took}",
            "most lost: " + ", ".join(f"{layer.name} {100 * layer.relative_loss:.3g}%" for layer in worst),
        ]
        notes = (*self.fallbacks(), *fallbacks.remarks(plan, self.layers), *plan.notes)
        return "\n".join([*lines, *(f"note: {clean(note)}" for note in notes)])

    def fallbacks(self) -> list[str]:
        """Name what became of layers otherwise than asked: tokens left out or too few, more damping, plain rounding."""
        return fallbacks.describe(self.plan, self.layers)


def check_fit(model: nn.Module, plan: Plan, blocks: Blocks | None = None) -> None:
    """Raise PlanError for a parameter beyond the largest number of the dtype in which `plan` stores floats."""
    limit = torch.finfo(plan.dtype).max
    for name, parameter in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if torch.finfo(parameter.dtype).max <= limit or (part == "weight" and layer in plan.layers):
            continue
        if parameter.is_meta and blocks is None:
            continue
        value = parameter.detach() if blocks is None else blocks.value(name)
        largest = float(value.abs().max()) if value.numel() else 0.0
        if largest > limit:
            raise PlanError(
                286,
                f"{name} holds {largest:.3g}, beyond the {limit:g} of {_short(plan.dtype)}, in which "
                f"{plan.container or 'the checkpoint'} stores floats; compressed-tensors keeps the model's own dtype.",
            )


def round_floats(model: nn.Module, plan: Plan, within: str = "") -> None:
    """Round what stays in float to the dtype in which `plan` stores it, in place, so that the model is what is saved.

    within  how the names of those parameters begin that are meant

    Raises PlanError for what is beyond the dtype's largest number.
    """
    check_fit(model, plan)
    for name, parameter in model.named_parameters():
        layer, _, part = name.rpartition(".")
        if name.startswith(within) and (part != "weight" or layer not in plan.layers):
            parameter.data = parameter.data.to(plan.dtype).to(parameter.dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    model = result.model
    assert isinstance(model, PreTrainedModel)
    written = _Written(exporter)
    if isinstance(exporter, FileExporter):
        _write_file(result, exporter, staging, written)
    else:
        shards.write(staging, written.tensors(result), limit=MAX_SHARD_SIZE)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears += moe.routers(model)  # linear layers to other loaders
    quantization = exporter.config(result.plan, linears)
    if isinstance(exporter, Native):
        quantization["layers"] = written.about
    elif written.factors:
        peft.write(staging / peft.FOLDER, written.factors, result.source)
    if isinstance(exporter, Gptq):
        write_text(staging / gptq.FILE, json.dumps(quantization, indent=1) + "\n")
    _write_configs(model, result.plan, quantization, result.tokenizer, staging)
    record = {key: value for key, value in result.record().items() if key not in MEASURED}
    record["files"] = sorted(p.name for p in staging.iterdir())
    record["digests"] = digests.make(staging, record, written.layers, written.others, str(model.config.model_type))
    write_text(staging / MARK, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _write_configs(
    model: PreTrainedModel, plan: Plan, quantization: dict[str, Any], tokenizer: Any, staging: Path
) -> None:
    """Write how the model is built, what its tensors mean, how it generates, and its tokenizer."""
    config = copy.deepcopy(model.config)
    config.dtype = plan.dtype
    config.architectures = [type(model).__name__]
    if quantization:
        config.quantization_config = quantization
    with quiet():
        if model.is_remote_code():
            custom_object_save(model, staging, config=config)
        config.save_pretrained(staging)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


class _Written:
    """What is written of a model, layer by layer, and what is to be known of it afterwards.

    layers   digests of the quantized layers, others of all other tensors, by name in memory
    about    what `quantization_config` says of each layer, for our own container
    factors  of low-rank corrections, which other containers hold beside the model
    """

    def __init__(self, exporter: Exporter) -> None:
        self.exporter = exporter
        self.layers: dict[str, str] = {}
        self.others: dict[str, str] = {}
        self.about: dict[str, Any] = {}
        self.factors: dict[str, LowRank] = {}

    def tensors(self, result: Result) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the files, by its name there, in the order of the model."""
        weights = {layer.name: layer.weight for layer in result.layers}
        ignored = set(getattr(result.model, "_keys_to_ignore_on_save", None) or ())
        for name, value in (result.blocks or Blocks(result.model)).state(weights):
            layer = name.removesuffix(".weight")
            if value is None:
                found = self.layer(layer, weights[layer])
                names = shards.names_in_files(result.model, found)
                yield from ((names[key], tensor) for key, tensor in found.items())
            elif name not in ignored:
                found = {name: value.to("cpu", result.plan.dtype if value.is_floating_point() else None)}
                self.others |= {key: digests.tensor_digest(tensor) for key, tensor in found.items()}
                yield from shards.in_files(result.model, found).items()

    def layer(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors of one layer, and note what is to be known of it."""
        if isinstance(weight, UnreadWeight):
            weight = weight.read()
        self.note(name, weight)
        return {key: value.cpu() for key, value in self.exporter.tensors(name, weight).items()}

    def note(self, name: str, weight: QWeight) -> None:
        """Note what is to be known of one layer."""
        self.layers[name] = digests.layer_digest(weight)
        if isinstance(self.exporter, Native):
            self.about[name] = self.exporter.describe(weight)
        else:
            self.factors.update((name, r) for r in weight.residuals if isinstance(r, LowRank))


def _write_file(result: Result, exporter: FileExporter, staging: Path, written: _Written) -> None:
    """Let an exporter write a file of its own, for which all tensors are in memory."""
    assert isinstance(result.model, PreTrainedModel)
    layers = {layer.name: layer.weight for layer in result.layers}
    tensors = _in_dtype(result.model.state_dict(), result.plan.dtype)
    for name in layers:
        del tensors[f"{name}.weight"]
    exporter.write(staging, result.model, result.plan, layers, tensors, result.tokenizer, result.source)
    for name, weight in layers.items():
        written.note(name, weight)
    written.others = digests.wide(tensors)
