"""The tensors of a checkpoint, layer by layer: what stands for each, whether it fits, and what is left over."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from quantforge import stored
from quantforge.digests import layer_of
from quantforge.exporters import gguf, peft
from quantforge.models import blocks, check, moe
from quantforge.models.folder import FLOATS
from quantforge.models.headers import TensorInfo, show, some
from quantforge.numerics.problem import QWeight
from quantforge.numerics.residuals import LowRank
from quantforge.stored import Stored
from quantforge.verification.report import Finding, noting


@dataclass(frozen=True)
class Parts:
    """What the headers of a checkpoint say, set against the model of its config.

    fused   the model on the meta device as transformers makes it
    shapes  of every linear layer [out, in], by name; experts are layers of their own
    held    by quantized layer, what stands for it in the files: name in the model's terms → header
    others  all other tensors, likewise
    """

    fused: nn.Module
    shapes: dict[str, tuple[int, int]]
    held: dict[str, dict[str, TensorInfo]]
    others: dict[str, TensorInfo]

    def load(self, info: TensorInfo) -> Tensor:
        """Return a tensor of one of the files, as it is stored."""
        return blocks.read(info)

    @property
    def files(self) -> dict[str, str]:
        """Return what each linear layer is called in the files."""
        return {name: _in_file(name, self.held.get(name, {})) for name in self.shapes}


def sort_out(opened: Stored) -> Parts:
    """Tell the tensors of quantized layers from all others; ModelError if there is no model of such a config.

    A linear layer is quantized if anything but a weight in float, and a bias, has its name.
    """
    fused = stored.skeleton(opened)
    model = copy.deepcopy(fused)
    moe.unfuse(model)
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
    named = moe.as_in_model(opened.kind, opened.files.tensors)
    owners = {key: layer_of(key, shapes) for key in named}
    odd = {owner for key, owner in owners.items() if owner and not _is_float(key, owner, named[key])}
    if opened.container == "native":
        odd |= {name for name in _told_layers(opened.quantization) if name in shapes}
    held: dict[str, dict[str, TensorInfo]] = {name: {} for name in shapes if name in odd}
    others = {}
    for key, info in named.items():
        owner = owners[key]
        if owner in odd and owner is not None and not key.endswith(".bias"):
            held[owner][key] = info
        else:
            others[key] = info
    return Parts(fused, shapes, held, others)


def _is_float(key: str, owner: str, info: TensorInfo) -> bool:
    return key == f"{owner}.bias" or (key == f"{owner}.weight" and info.dtype in FLOATS)


def _told_layers(quantization: Mapping[str, Any]) -> Collection[str]:
    layers = quantization.get("layers")
    return layers if isinstance(layers, Mapping) else ()


def _in_file(name: str, held: Mapping[str, TensorInfo]) -> str:
    """Return what the layer `name` is called in the files, where some architectures rename what comes before it."""
    for key, info in held.items():
        return info.name[: len(info.name) - (len(key) - len(name))]
    return name


def check_told(parts: Parts, told: set[str]) -> list[Finding]:
    """Return the layers that the config says are quantized and that are not, and the other way round."""
    found = []
    present = {layer_of(key, parts.shapes) for key in parts.others if not key.endswith(".bias")}
    for name in sorted(told - set(parts.held)):
        if name not in parts.shapes:
            found.append(
                Finding(f"config.json: quantization_config names {show(name)}, which is no linear layer.", 349)
            )
        elif name in present:  # else it is missing, or tied to another tensor
            info = parts.others[f"{name}.weight"]
            found.append(
                Finding(
                    f"config.json: quantization_config says that {name} is quantized, but {info.file.name} holds it in "
                    f"{info.dtype}.",
                    349,
                )
            )
    for name in sorted(set(parts.held) - told):
        found.append(
            Finding(
                f"config.json: quantization_config leaves {name} in float, but {_files(parts.held[name])} holds it "
                "quantized.",
                349,
            )
        )
    return found


def read_layer(opened: Stored, name: str, parts: Parts, findings: list[Finding]) -> QWeight | None:
    """Return a quantized layer as it is stored; None, with what is wrong in `findings`, if it is damaged."""
    tensors = {key: parts.load(info) for key, info in parts.held[name].items()}
    where = _files(parts.held[name])
    faults: list[Finding] = []
    weight = None
    with noting(faults), stored.as_damage(opened.files.path):
        found = opened.exporter.read(_narrowed(opened, name), tensors)
        weight = found.get(name)
        if weight is None:
            listed = some(show(key) for key in sorted(tensors))
            faults.append(Finding(f"{name} lacks its codes: {listed} alone say nothing; it is incomplete.", 349))
        elif left := sorted({*tensors, *_unread(name, weight, parts)}):
            listed = some(map(show, left))
            faults.append(Finding(f"{listed} {_do(left)} not belong to {name} as the config describes it.", 349))
        elif weight.base.shape != parts.shapes[name]:
            sizes = f"{list(weight.base.shape)}, not {list(parts.shapes[name])}"
            faults.append(Finding(f"{name} is {sizes} as the model of config.json has it.", 349))
    findings += [replace(fault, message=f"{where}: {fault.message}") for fault in faults]
    return None if faults else weight


def _unread(name: str, weight: QWeight, parts: Parts) -> list[str]:
    """Return what a reader takes without looking at it: zero points beside weights that are said to have none."""
    zero = f"{name}.weight_zero_point"
    return [zero] if zero in parts.held[name] and weight.base.zero is None else []


def _do(several: Collection[object]) -> str:
    return "does" if len(several) == 1 else "do"


def _narrowed(opened: Stored, name: str) -> dict[str, Any]:
    """Return the `quantization_config` with `name` as its only layer, where it lists them."""
    if opened.container != "native":
        return opened.quantization
    layers = opened.quantization.get("layers")
    own = {name: layers[name]} if isinstance(layers, Mapping) and name in layers else {}
    return {**opened.quantization, "layers": own}


def check_config(opened: Stored, findings: list[Finding]) -> bool:
    """Tell whether the config describes a container that can be read at all; what is wrong goes to `findings`."""
    before = len(findings)
    bare = {**opened.quantization, "layers": {}} if opened.container == "native" else opened.quantization
    with noting(findings), stored.as_damage(opened.files.path):
        opened.exporter.read(bare, {})
    return len(findings) == before


def check_others(opened: Stored, parts: Parts, findings: list[Finding]) -> None:
    """Check that the files hold the model of the config, the quantized layers in their places, and finite floats."""
    whole = {info.name: info for info in parts.others.values()}
    for name, held in parts.held.items():
        file = _in_file(name, held)
        place = next(iter(held.values())).file if held else opened.files.path
        whole[f"{file}.weight"] = TensorInfo(f"{file}.weight", "F32", parts.shapes[name], place, 0, 0)
    with noting(findings):
        check.check_names_and_shapes(replace(opened.files, tensors=whole), parts.fused)
    for key, info in parts.others.items():
        if not check.is_finite(parts.load(info)):
            findings.append(Finding(f"{info.file.name}: {show(key)} holds NaN or Inf; it is damaged.", 348))


def check_whole(
    opened: Stored, layers: Mapping[str, QWeight], tensors: Mapping[str, Tensor], findings: list[Finding]
) -> None:
    """Check names, shapes and values of what was read from a file that is no safetensors."""
    model: Any = stored.skeleton(opened)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes = {f"{name}.weight": tuple(weight.base.shape) for name, weight in layers.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, shape in wanted.items():
        if name not in shapes:
            findings.append(Finding(f"{gguf.FILE}: {show(name)} is missing; it is incomplete.", 349))
        elif shapes[name] != shape:
            findings.append(
                Finding(f"{gguf.FILE}: {show(name)} is {list(shapes[name])}, not {list(shape)} as in config.json.", 349)
            )
    for name, tensor in tensors.items():
        if not check.is_finite(tensor):
            findings.append(Finding(f"{gguf.FILE}: {show(name)} holds NaN or Inf; it is damaged.", 348))


def read_adapter(opened: Stored, parts: Parts, findings: list[Finding]) -> dict[str, LowRank]:
    """Return the factors of the adapter beside the checkpoint by layer; those of no layer go to `findings`."""
    with noting(findings):
        found = stored.read_adapter(opened.files.path)
        strange = sorted(set(found) - set(parts.held))
        findings += [Finding(f"{peft.FOLDER}: {show(n)} is no quantized layer to correct.", 356) for n in strange]
        return found
    return {}


def has_adapter(opened: Stored) -> bool:
    """Tell whether an adapter lies beside the checkpoint."""
    return (opened.files.path / peft.FOLDER).is_dir()


def _files(held: Mapping[str, TensorInfo]) -> str:
    return ", ".join(sorted({info.file.name for info in held.values()})) or "config.json"
