"""The optimizers by name, each parameter's learning rate and weight decay, and the states as plain tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantforge.errors import ResourceError, pick
from quantforge.training.adam8 import CompactAdamW

OPTIMIZERS = ("adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit")
EPS = 1e-8
_RANGES = ("scale", "zero_point")  # how names end


def make(
    name: str,
    named: Mapping[str, Tensor],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    lr_of: Callable[[str], float] | None = None,
    pages: Path | None = None,
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer `name` over named parameters, with learning rates of 0 until `set_rate`.

    lr_of    name of a parameter → factor on its learning rate; 1 for all if None
    pages    folder for the states of paged optimizers; the system's temporary one if None
    sharded  the parameters are spread over processes
    Raises RecipeError for an unknown name, and ResourceError if bitsandbytes is needed and missing.
    """
    pick("optimizer", name, OPTIMIZERS)
    groups = _groups(named, weight_decay, lr_of)
    settings: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": EPS}
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=None if sharded else True, **settings)
    bits = 8 if name.endswith("8bit") else 32
    if any(p.device.type == "cuda" for p in named.values()):
        return _bitsandbytes(name, groups, settings)
    folder = (pages or Path(tempfile.gettempdir())) if name.startswith("paged") else None
    return CompactAdamW(groups, bits=bits, pages=folder, **settings)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters, each times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Tell whether weight decay applies: to matrices that multiply, not to norms, biases, scales and zero points.

    Norms and biases have one dimension. Scales and zero points have two, and are told by how their names end: pulled
    towards 0 they would shrink the weights that they are the measure of.
    """
    return parameter.dim() > 1 and not name.endswith(_RANGES)


def states(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return the optimizer's states of a parameter as tensors; empty before the first step."""
    found = optimizer.state.get(parameter, {})
    return {
        key: torch.tensor(x) if isinstance(x, int) else x for key, x in found.items() if isinstance(x, int | Tensor)
    }


def restore(optimizer: torch.optim.Optimizer, kept: Mapping[Tensor, dict[str, Tensor]]) -> None:
    """Put back what `states` gave of each parameter; paged states of bitsandbytes come to lie in the GPU's memory."""
    groups = optimizer.state_dict()["param_groups"]
    order = [p for group in optimizer.param_groups for p in group["params"]]
    numbered = {i: {key: _counted(x) for key, x in kept.get(p, {}).items()} for i, p in enumerate(order)}
    optimizer.load_state_dict({"state": {i: x for i, x in numbered.items() if x}, "param_groups": groups})


def _groups(
    named: Mapping[str, Tensor], weight_decay: float, lr_of: Callable[[str], float] | None
) -> list[dict[str, Any]]:
    """Sort parameters by factor and decay, in the order of their first."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in named.items():
        key = (1.0 if lr_of is None else lr_of(name), weight_decay if is_decayed(name, p) else 0.0)
        found.setdefault(key, []).append(p)
    return [{"params": params, "factor": factor, "weight_decay": decay} for (factor, decay), params in found.items()]


def _bitsandbytes(name: str, groups: list[dict[str, Any]], settings: dict[str, Any]) -> torch.optim.Optimizer:
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ResourceError(
            540, f"{name} on CUDA is that of bitsandbytes, which cannot be imported; install it, or use adamw."
        ) from error
    known = {"adamw8bit": "AdamW8bit", "paged-adamw": "PagedAdamW", "paged-adamw8bit": "PagedAdamW8bit"}
    made: torch.optim.Optimizer = getattr(optim, known[name])(groups, **settings)
    return made


def _counted(x: Tensor) -> Tensor | int:
    """Return a count of steps as the int it was with bitsandbytes; other tensors as they are."""
    return int(x) if x.dtype == torch.int64 and x.dim() == 0 else x
