"""Checkpoints whose quantized layers stay packed: codes in place of weights, and operators that compute with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quantforge import checkpoint
from quantforge.errors import ResourceError
from quantforge.models import activations
from quantforge.models.load import check_device
from quantforge.numerics.problem import QWeight
from quantforge.runtime import fuse, table
from quantforge.runtime.kernel import Kernel, PackedLinear, nbytes


@dataclass(frozen=True)
class Loaded:
    """A model for inference, and by which operator each quantized layer computes, and why; notes for the user."""

    model: nn.Module
    operators: dict[str, tuple[str, str]]
    notes: tuple[str, ...] = ()


def read(
    folder: Path,
    dtype: torch.dtype | None = None,
    *,
    strict: bool = False,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Loaded:
    """Return the model of a quantized checkpoint with its codes packed for `device`.

    dtype   of everything that is not quantized, and of what goes through the layers; default: the checkpoint's
    strict  refuse, with ResourceError, what no operator here computes; else it is dequantized
    Raises what `checkpoint.read` does, and ResourceError for a device that is not there.
    """
    check_device(device)
    model, layers = checkpoint.read_hollow(folder, dtype, trust_remote_code=trust_remote_code)
    dtype = next(model.parameters()).dtype
    model.requires_grad_(False)
    choices = {name: table.choose(weight, device, dtype) for name, weight in layers.items()}
    modules = dict(model.named_modules())
    choices |= {
        name: table.Choice(table.REFERENCE, f"it is a {type(modules.get(name)).__name__}, no nn.Linear")
        for name in layers
        if not isinstance(modules.get(name), nn.Linear)
    }
    missing = [name for name, choice in choices.items() if choice.row is None]
    if strict and missing:
        raise ResourceError(
            543, f"{missing[0]} would be computed from floats: {choices[missing[0]].reason}; leave out --strict."
        )
    for names in fuse.partners(model, list(layers)):
        _place(model, names, layers, choices, device)
    notes = _notes(missing, choices)
    operators = {name: (choice.name, choice.reason) for name, choice in choices.items()}
    return Loaded(model.to(device), operators, notes)


def _place(
    model: nn.Module, names: Sequence[str], layers: dict[str, QWeight], choices: dict[str, table.Choice], device: str
) -> None:
    """Put layers that read the same input into a model: as one product if they can be, and let go of their codes."""
    taken = [layers.pop(name) for name in names]
    modules = [model.get_submodule(name) for name in names]
    whole = fuse.stack(taken) if len(names) > 1 and all(choices[name].row for name in names) else None
    choice = None if whole is None else table.choose(whole, device)
    if whole is not None and choice is not None and choice.row is choices[names[0]].row:
        joint = fuse.Joint(table.kernel(whole, choice, device), [w.base.shape[0] for w in taken])
        for i, (name, module) in enumerate(zip(names, modules, strict=True)):
            assert isinstance(module, nn.Linear)
            model.set_submodule(name, fuse.JointLinear(joint, i, module.bias).train(False))
        return
    for name, weight, module in zip(names, taken, modules, strict=True):
        assert isinstance(module.weight, Tensor)
        if choices[name].row is None:
            module.weight = nn.Parameter(weight.dequantize(module.weight.dtype), requires_grad=False)
            if weight.inputs is not None:
                activations.gate(module, weight.inputs)
        else:
            assert isinstance(module, nn.Linear)
            model.set_submodule(name, PackedLinear(table.kernel(weight, choices[name], device), module.bias).eval())


def _notes(missing: Sequence[str], choices: dict[str, table.Choice]) -> tuple[str, ...]:
    reasons: dict[str, list[str]] = {}
    for name in missing:
        reasons.setdefault(choices[name].reason, []).append(name)
    return tuple(
        f"{len(names)} of {len(choices)} quantized layers are computed from floats, {names[0]} first: {reason}"
        for reason, names in reasons.items()
    )


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all weights of a model, packed or not; what layers share counts once."""
    return nbytes(_tensors(model)) + sum(kernel.nbytes for kernel in _kernels(model.modules()))


def linear_bytes(model: nn.Module, names: Sequence[str]) -> int:
    """Count the bytes of the layers called `names` and their scales, packed or not, without biases."""
    modules = [model.get_submodule(name) for name in names]
    floats = {id(m.weight): m.weight for m in modules if isinstance(m, nn.Linear)}
    return nbytes(floats.values()) + sum(kernel.nbytes for kernel in _kernels(modules))


def _tensors(model: nn.Module) -> list[Tensor]:
    return list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def _kernels(modules: Iterator[nn.Module] | Sequence[nn.Module]) -> list[Kernel]:
    return list({id(m.kernel): m.kernel for m in modules if isinstance(m, PackedLinear)}.values())
