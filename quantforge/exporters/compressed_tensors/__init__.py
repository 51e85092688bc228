"""compressed-tensors: checkpoints that stock transformers loads, and vLLM where it has kernels for what they hold.

Each layer is in the layout that is made for its format:

    pack-quantized        integer weights of 2 to 8 bits by group or channel; their inputs rounded or not
    int-quantized         symmetric int8 weights whose inputs are rounded to integers
    float-quantized       E4M3 weights by channel, by tensor or in blocks of 128 x 128; their inputs E4M3 or float
    mxfp4-pack-quantized  MXFP4 weights
    nvfp4-pack-quantized  NVFP4 weights whose global scale is a power of two

A loader computes (q − z) · s in the dtype in which it loads the scales, which is what `QTensor.dequantize` computes, so
its weights equal ours bit for bit; transformers computes those of experts in the checkpoint's dtype, whatever dtype it
loads the model in.

Inputs are rounded by token, by tensor or by group of channels, or by a calibrated scale of the tensor. transformers
rounds them in the dtype that it computes in: in float32 to the same numbers as ours; in bfloat16 x / s itself has 8
bits, and what lies near the middle of two codes may get the other one.

Not held, because stock transformers would compute something else: rounded inputs of experts; inputs by token of layers
that get one long list of tokens, for which it finds a single scale, as OPT's `fc1` and `fc2` do, and as those of an
architecture that the table lacks may; rounded inputs beside a low-rank correction, whose own it would not round; and
fused experts in float, which it loses as it reads, unless all else is float-quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ModelError
from quantforge.exporters.compressed_tensors import fp4, packed, schemes, whole
from quantforge.exporters.compressed_tensors.schemes import FLOAT, INT, MXFP4, NVFP4, PACK, layout
from quantforge.models import moe
from quantforge.numerics.blocks import Flat
from quantforge.numerics.formats import Format
from quantforge.numerics.inputs import Inputs
from quantforge.numerics.problem import QWeight
from quantforge.plan import LayerPlan, Plan
from quantforge.registry import register

_ALL_EXPERTS = r"re:.*\.experts\.\d+\..*"
_FLATTENED = re.compile(r".*\.decoder\.layers\.\d+\.fc[12]")  # OPT
_LAYOUTS = {PACK: packed, INT: whole, FLOAT: whole, MXFP4: fp4, NVFP4: fp4}
_MIXED = "mixed-precision"


@register("exporter", "compressed-tensors")
@dataclass(frozen=True)
class CompressedTensors:
    """Checkpoints of the compressed-tensors library, which stock transformers loads."""

    def takes(self, plan: Plan) -> bool:
        """Tell whether `plan` has only formats of this container; low-rank factors go beside it."""
        return _refuses_fused(plan) is None and all(_why_not(p, plan) is None for p in plan.layers.values())

    def refuses(self, plan: Plan) -> str | None:
        """Return why `plan` cannot be held exactly, and what could; None if it can."""
        transposed = [p.name for p in plan.layers.values() if p.transposed]
        if transposed:
            return (
                f"compressed-tensors holds nn.Linear only, and {transposed[0]} (with {len(transposed) - 1} more) is a "
                "Conv1D; quantize in memory from Python, or use `quantforge compare`, which needs no checkpoint."
            )
        for reason in (_refuses_fused(plan), *(_why_not(p, plan) for p in plan.layers.values())):
            if reason:
                return reason
        packs = [p for p in plan.layers.values() if layout(p.format, p.inputs) == PACK]
        uneven = [p for p in packs if p.shape[1] % (_columns(p.format) or 1)]
        if uneven:
            widths = sorted({p.shape[1] for p in uneven})
            group = _columns(uneven[0].format)
            sizes = [n for n in (256, 128, 96, 64, 48, 32, 16) if all(p.shape[1] % n == 0 for p in packs)]
            works = ", ".join(map(str, sizes)) or "-1 (a whole row)"
            return (
                f"group size {group} does not divide the {' and '.join(map(str, widths))} inputs of {len(uneven)} "
                f"layers (first {uneven[0].name}); these sizes divide every layer: {works}."
            )
        return _refuses_experts(plan)

    def fix(self, fmt: Format) -> Format:
        """Return `fmt` as it is."""
        return fmt

    def dtypes(self, own: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
        """Return the model's own dtype for floats; scales may have any."""
        return own, None

    def tensors(self, name: str, weight: QWeight) -> dict[str, Tensor]:
        """Return the tensors that stand in the file for the layer `name`, by full name; factors stand elsewhere."""
        q = weight.base
        kind = layout(q.format, weight.inputs.inputs if weight.inputs else None)
        assert kind is not None
        parts = _LAYOUTS[kind].tensors(q)
        if isinstance(q.scale, Tensor):
            parts |= schemes.input_tensors(weight.inputs, q.scale.dtype)
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    def config(self, plan: Plan, linears: list[str]) -> dict[str, Any]:
        """Return the `quantization_config`, in keys that every reader of the format has long known.

        linears  names of all nn.Linear modules of the model; those that the plan leaves alone are listed as ignored
        """
        by_scheme: dict[tuple[Format, Inputs | None], list[str]] = {}
        for p in plan.layers.values():
            by_scheme.setdefault((p.format, p.inputs), []).append(p.name)
        kinds = {str(layout(fmt, inputs)) for fmt, inputs in by_scheme}
        groups = {}
        for i, ((fmt, inputs), names) in enumerate(by_scheme.items()):
            # a file of one format says so for all layers; one of several names each layer
            targets = ["Linear"] if len(by_scheme) == 1 else _targets(names)
            kind = layout(fmt, inputs)
            groups[f"group_{i}"] = {"targets": targets, **schemes.scheme(fmt, inputs)}
            # where it is left out, compressed-tensors takes words of bits for inputs in float only, bytes of E4M3 for
            # rounded ones only
            if len(kinds) > 1 or (kind == PACK and inputs) or (kind == FLOAT and not inputs):
                groups[f"group_{i}"]["format"] = kind
        return {
            "quant_method": "compressed-tensors",
            "format": kinds.pop() if len(kinds) == 1 else _MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [name for name in linears if name not in plan.layers],
        }

    def read(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, QWeight]:
        """Return the quantized layers by name, taking their tensors out of `tensors`, all those of a checkpoint.

        Raises ModelError for another format, for what would change the numbers and is not read, and for tensors that
        are missing or do not fit together.
        """
        method, kind = config.get("quant_method"), config.get("format")
        if method != "compressed-tensors" or kind not in (*_LAYOUTS, _MIXED):
            raise ModelError(
                370,
                f"the checkpoint is in {method} / {kind}; quantforge reads compressed-tensors / {', '.join(_LAYOUTS)}.",
            )
        _refuse_unread(config)
        groups = _read_groups(config.get("config_groups"), str(kind))
        layers = {}
        for key in list(tensors):
            name, _, part = key.rpartition(".")
            if part == "weight_packed" or (part == "weight" and tensors[key].dtype in whole.DTYPES):
                group = next((g for g in groups if _is_target(name, g.targets)), None)
                if group is None:
                    raise ModelError(371, f"no config group of the checkpoint says how {name} is stored.")
                module = _LAYOUTS[group.layout]
                parts = {p: tensors.pop(f"{name}.{p}", None) for p in module.PARTS}
                rounds = schemes.read_input_tensors(name, group.inputs, tensors)
                weight = module.read(name, group.format, parts)
                size = _columns(group.inputs.format) if group.inputs else None
                if weight.shape[1] % (size or 1):
                    raise ModelError(393, f"groups of {size} do not divide the {weight.shape[1]} inputs of {name}.")
                layers[name] = QWeight(weight, {}, inputs=rounds)
        return layers


def _columns(fmt: Format) -> int | None:
    assert not isinstance(fmt.block, Flat)
    return fmt.block[1]


def _why_not(p: LayerPlan, plan: Plan) -> str | None:
    """Return why no layout holds a layer of `plan` exactly, and what could; None if one does, were its groups even."""
    kind = layout(p.format, p.inputs)
    if kind is None:
        inputs = f" with inputs in {p.inputs}" if p.inputs else ""
        return (
            f"compressed-tensors cannot hold {p.format}{inputs} of {p.name}; int2 to int8 by group or channel it can, "
            "without minima in floats."
        )
    if p.solver.extends_format:
        return f"compressed-tensors cannot hold what the solver of {p.name} keeps beside its codes; rtn and gptq work."
    if kind != PACK and moe.expert_of(p.name):
        return f"compressed-tensors is not written with {kind} experts such as {p.name}; int4-g32-sym works."
    if kind != PACK and not _fits(p, kind):
        return f"stock loaders misread {p.format} of {p.name}, which is {p.shape[0]} x {p.shape[1]}; by channel works."
    return _refuses_inputs(p, known=plan.known) if p.inputs else None


def _fits(p: LayerPlan, kind: str) -> bool:
    if kind in (INT, FLOAT):
        return whole.fits(p.shape, p.format)
    return p.shape[1] % (_columns(p.format) or 1) == 0


def _refuses_inputs(p: LayerPlan, *, known: bool) -> str | None:
    """Return why stock loaders would not round the inputs of a layer as it does.

    known  that layers but OPT's get their inputs as [batch, tokens, in]
    """
    assert p.inputs is not None
    block = p.inputs.format.block
    assert not isinstance(block, Flat)
    if p.corrections:
        return f"compressed-tensors cannot hold rounded inputs of {p.name} beside its correction; use either."
    if moe.expert_of(p.name):
        return f"stock loaders do not round the inputs of experts such as {p.name}; leave them in float."
    if block == (1, None) and _FLATTENED.fullmatch(p.name):
        return f"stock loaders round the inputs of {p.name} by tensor where they should by token; int8-tensor works."
    if block == (1, None) and not known:
        return (
            f"stock loaders round inputs by tensor where {p.name} gets a list of tokens, as it may in an architecture "
            "that the table lacks; int8-tensor works, and native can hold them by token."
        )
    if p.shape[1] % (block[1] or 1):
        return f"groups of {block[1]} do not divide the {p.shape[1]} inputs of {p.name}; by token works."
    return None


def _targets(names: list[str]) -> list[str]:
    """Name each layer, and all experts by a pattern: that is how stock loaders know their format from the others'."""
    plain = [name for name in names if not moe.expert_of(name)]
    return [*plain, _ALL_EXPERTS] if len(plain) < len(names) else plain


def _refuses_fused(plan: Plan) -> str | None:
    """Return why stock loaders, which look for packed experts alone, would lose the fused experts in float of `plan`.

    Beside E4M3 they take experts as they are.
    """
    kinds = {layout(p.format, p.inputs) for p in plan.layers.values()}
    if not plan.fused or kinds == {FLOAT}:
        return None
    return (
        f"stock loaders lose the float experts of {plan.fused[0]} (with {len(plan.fused) - 1} more) beside "
        "quantized layers; e4m3-channel works, and native can hold them."
    )


def _refuses_experts(plan: Plan) -> str | None:
    """Return why stock loaders, which put the experts of a block together as they read, could not read `plan`."""
    experts = [p for p in plan.layers.values() if moe.expert_of(p.name)]
    others = f"(with {len(experts) - 1} more)"
    floats = [name for name in plan.floats if moe.expert_of(name)]
    if floats:
        return (
            f"stock loaders lose experts that are not quantized, such as {floats[0]} (with {len(floats) - 1} more); "
            "quantize all experts, or keep the result in memory."
        )
    if any(not p.format.symmetric for p in experts):
        return f"stock loaders drop the zero points of experts, such as {experts[0].name} {others}; --symmetric works."
    if any(p.corrections for p in experts):
        return f"no adapter fits experts such as {experts[0].name} {others}; a method without low-rank factors works."
    odd = next((p for p in experts if p.format != experts[0].format), None)
    if odd is not None:
        return (
            f"stock loaders read all experts in one format, but {experts[0].name} is {experts[0].format} and "
            f"{odd.name} is {odd.format}; give all experts one format."
        )
    return None


@dataclass(frozen=True)
class _Group:
    """How the layers that `targets` name are stored, and how they round their inputs."""

    targets: list[str]
    layout: str
    format: Format
    inputs: Inputs | None


def _refuse_unread(config: Mapping[str, Any]) -> None:
    """Raise ModelError for what would change the numbers of the model and is not read."""
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = config.get(key)
        dense = key == "sparsity_config" and isinstance(value, Mapping) and value.get("format") == "dense"
        if value and not dense:
            raise ModelError(392, f"the checkpoint has a {key}, which is not read; one without it works.")


def _is_target(name: str, targets: list[str]) -> bool:
    return any(t == "Linear" or t == name or (t.startswith("re:") and re.match(t[3:], name)) for t in targets)


def _read_groups(groups: object, kind: str) -> list[_Group]:
    """Return the config groups; `kind` is the layout of those that do not say theirs."""
    if not isinstance(groups, dict) or not groups:
        raise ModelError(371, "the checkpoint has no config groups that say how its layers are stored.")
    found = []
    for group in groups.values():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ModelError(371, "a config group of the checkpoint does not say which layers it is for.")
        own = group.get("format") or kind
        if own not in _LAYOUTS:
            raise ModelError(370, f"a config group is in {own}; quantforge reads {', '.join(_LAYOUTS)}.")
        if group.get("output_activations") is not None:
            raise ModelError(392, "a config group rounds outputs (output_activations), which is not read; inputs are.")
        fmt = schemes.read_weights(own, group.get("weights"))
        found.append(_Group(targets, own, fmt, schemes.read_inputs(group.get("input_activations"))))
    return sorted(found, key=lambda group: "Linear" in group.targets)  # names before what stands for all
