"""Training a quantized student back to quality: its scales, zero points, norms, factors, biases, or its weights.

What a step computes with is what the checkpoint will store, bit for bit: nothing is lost when the student is saved, and
the saved folder is an ordinary checkpoint of its format. Codes stay, such as those that GPTQ has chosen, unless the
weights under them are trained; with scales alone this is the end-to-end stage of EfficientQAT (Chen et al.,
arXiv:2407.11062, section 3.3), with weights and scales LSQ (Esser et al., arXiv:1902.08153).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from quantforge import exporters
from quantforge.distill.straight_through import range_to_train
from quantforge.errors import PlanError, RecipeError, pick
from quantforge.exporters.bitsandbytes8 import Bitsandbytes8
from quantforge.numerics.residuals import LowRank
from quantforge.plan import with_notes
from quantforge.result import Result
from quantforge.solving import Layer
from quantforge.training.coded import CodedLinear
from quantforge.training.layers import check_float32, computed_layers, norms, settle_norms, train_norms

PARTS = ("scales", "zero-points", "norms", "factors", "weights", "biases")
_RANGES = frozenset({"scales", "zero-points", "weights"})


def open_student(result: Result, parts: Iterable[str] = ("scales", "norms")) -> nn.Module:
    """Make the model of `result` a student whose `parts` can be trained, in place; return it.

    parts  of `PARTS`. scales: of the quantized layers; zero-points: theirs; norms: all norms of the model; factors: of
           low-rank corrections, with their scales; weights: those under the codes, rounded straight through in every
           pass; biases: of the quantized layers

    Its logits are those of the quantized model until a step is taken. Only the parts have `requires_grad`: parameters
    called `LAYER.scale`, `LAYER.zero_point`, `LAYER.latent`, `LAYER.factor0_a`, `LAYER.bias` and
    `NORM.parametrizations.weight.original`, see `CodedLinear`. Embeddings, the head and layers in float stay as they
    are. Layers hold codes in place of float weights until `settle`; meanwhile the result cannot be saved.

    Raises RecipeError for an unknown part, PlanError for one that the model has not or its format cannot train.
    """
    wanted = frozenset(pick("part of a student", part, PARTS) for part in parts)
    _check(result, wanted)
    model, dtype = result.model, result.plan.dtype
    model.requires_grad_(False)
    for layer in result.layers:
        own = model.get_submodule(layer.name)
        model.set_submodule(layer.name, CodedLinear(own, layer.weight, _parts_of(layer, wanted), dtype))
    if "norms" in wanted:
        train_norms(model, dtype)
    return model


def settle(result: Result) -> Result:
    """Return what `open_student` made of `result` as an ordinary result again: codes, scales and floats as stored.

    Its model, the same module in place, computes with the dequantized weights, and gives the logits that the trained
    student gave. Losses of layers stay those of before the training, as a note says.
    """
    model = result.model
    opened = computed_layers(model)
    trained: set[str] = set()
    layers = []
    for layer in result.layers:
        student = opened[layer.name]
        assert isinstance(student, CodedLinear)
        parts = sorted(student.parts)
        trained.update(parts)
        weight = student.settled(layer.weight)
        if parts:
            weight = replace(weight, notes={**weight.notes, "trained": ", ".join(parts)})
        model.set_submodule(layer.name, student.restored(weight.dequantize(student.dtype).to(student.device)))
        layers.append(replace(layer, weight=weight))
    trained |= {"norms"} if settle_norms(model) else set()
    model.requires_grad_(True).eval()
    note = f"trained after quantizing: {', '.join(sorted(trained))}; losses of layers are those before"
    return replace(result, layers=tuple(layers), plan=with_notes(result.plan, [note]))


def _parts_of(layer: Layer, wanted: frozenset[str]) -> frozenset[str]:
    """Return which of the wanted parts a layer has."""
    has = {"scales", "weights"}
    has |= set() if layer.weight.base.format.symmetric else {"zero-points"}
    has |= {"factors"} if any(isinstance(r, LowRank) for r in layer.weight.residuals) else set()
    return wanted & (has | {"biases"})


def _check(result: Result, wanted: frozenset[str]) -> None:
    """Raise RecipeError or PlanError unless every part is there and can be trained."""
    if not wanted:
        raise RecipeError(247, f"nothing is to be trained; name some of: {', '.join(PARTS)}.")
    model = result.model
    check_float32(model)
    for layer in result.layers:
        if wanted & _RANGES:
            try:
                range_to_train(layer.weight.base)
            except RecipeError as error:
                raise PlanError(294, f"{layer.name}: {error.args[0].rstrip('.')}; norms can be trained too.") from error
    if "scales" in wanted and isinstance(exporters.choose(result.plan), Bitsandbytes8):
        raise PlanError(
            294,
            "bitsandbytes' 8 bits hold the largest weight of a row as its scale, no trained one; train weights or "
            "norms, or quantize to int8-channel.",
        )
    there = {part for layer in result.layers for part in _parts_of(layer, frozenset(PARTS) - {"biases"})}
    there |= {"norms"} if next(norms(model), None) else set()
    there |= {"biases"} if any(model.get_submodule(layer.name).bias is not None for layer in result.layers) else set()
    if missing := sorted(wanted - there):
        raise PlanError(294, f"this student has no {missing[0]} to train; it has {', '.join(sorted(there))}.")
