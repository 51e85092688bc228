"""Layer-by-layer distillation: each block's weights trained so that, rounded, it gives what the float block gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantforge.models import activations, arch
from quantforge.models.walk import Call, finite, output_of
from quantforge.numerics.blocks import spread
from quantforge.numerics.formats import Format
from quantforge.numerics.inputs import QInput, Scheme
from quantforge.numerics.qtensor import fit
from quantforge.numerics.ranges import Range, round_to
from quantforge.registry import register


@register("tuner", "lkd")
@dataclass(frozen=True)
class LKD:
    """Layer-by-layer knowledge distillation (ZeroQuant, Yao et al., NeurIPS 2022, arXiv:2206.01861, section 4.3).

    The weights of one decoder block at a time are trained by the squared error between its output, weights and inputs
    rounded, and that of the float model's block; rounding passes gradients straight through. The best weights met are
    kept (our addition): they are looked for four times, on every few of the windows, rounding by min-max; a block for
    which none is better stays as it was.

    steps    of AdamW a block (the paper: at most 100)
    rate     learning rate (the paper: 5e-6)
    windows  of one step (the paper: 32)
    teacher  True: inputs are those of the float model, as in the paper; False: those that reach the block through the
             blocks before it as they are rounded
    """

    steps: int = 100
    rate: float = 5e-6
    windows: int = 1
    teacher: bool = True

    needs = ("blocks", "float_blocks")

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, not {self.steps}; the paper has 100")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, not {self.rate}; the paper has 5e-6")
        if self.windows < 1:
            raise ValueError(f"windows must be at least 1, not {self.windows}")

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why weights cannot be trained in `fmt`; None if they can."""
        if not isinstance(fmt.scale, torch.dtype):
            return f"distillation rounds anew in every step, and {fmt} quantizes its scales; int4-g64-asym works."
        return None

    def tune(
        self, block: nn.Module, schemes: Mapping[str, Scheme], calls: Sequence[Call], float_calls: Sequence[Call]
    ) -> dict[str, Range]:
        """Train the weights of `block` in place; return no ranges, which are left to the solver."""
        inputs = float_calls if self.teacher else calls
        with torch.no_grad():
            targets = [output_of(block, {}, call) for call in float_calls]
        pairs = [pair for call, target in zip(inputs, targets, strict=True) for pair in self._cut(call, target)]
        pairs = [pair for pair in pairs if finite(*pair)]  # one NaN would be all of the error
        modules = {name: block.get_submodule(name) for name in schemes}
        weights = {name: arch.get_weight(module).clone().requires_grad_() for name, module in modules.items()}
        most = max(self.windows // pairs[0][1].shape[0], 1) if pairs else 1  # a batch may have fewer than a step takes
        groups = [pairs[i : i + most] for i in range(0, len(pairs), most)]
        used = list(islice(cycle(groups), self.steps))
        judged = pairs[:: max(len(pairs) // 16, 1)]
        with _rounding_inputs(modules, schemes):
            best, least = {}, self._error(block, schemes, weights, judged)
            size = least / sum(t.numel() for _, t in judged)
            if not size > 0 or not self.steps:
                return {}
            optimizer = torch.optim.AdamW(weights.values(), lr=self.rate, weight_decay=0.0, eps=1e-12)
            for step, group in enumerate(used, 1):
                for call, target in group:
                    with torch.enable_grad():
                        loss = F.mse_loss(self._run(block, schemes, weights, call), target.float()) / size / len(group)
                        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                    for weight, gradient in zip(weights.values(), gradients, strict=True):
                        if gradient is not None:
                            weight.grad = gradient if weight.grad is None else weight.grad + gradient
                optimizer.step()
                optimizer.zero_grad()
                if step % max(self.steps // 4, 1) == 0 or step == self.steps:
                    error = self._error(block, schemes, weights, judged)
                    if error < least:
                        best, least = {name: w.detach().clone() for name, w in weights.items()}, error
        for name, weight in best.items():
            arch.set_weight(modules[name], weight)
        return {}

    def _cut(self, call: Call, target: Tensor) -> list[tuple[Call, Tensor]]:
        """Cut a batch of windows into those of one step each, or fewer where the batch has no more."""
        count = target.shape[0]
        starts = range(0, count, self.windows)
        return [(_sliced(call, count, s, s + self.windows), target[s : s + self.windows]) for s in starts]

    def _run(self, block: nn.Module, schemes: Mapping[str, Scheme], weights: dict[str, Tensor], call: Call) -> Tensor:
        """Return the block's output with all its weights rounded → [windows, tokens, width]."""
        parameters = {}
        for name, weight in weights.items():
            own = block.get_submodule(name)
            rounded = weight + (_rounded(weight.detach(), schemes[name].weights) - weight.detach())
            parameters[f"{name}.weight"] = arch.as_parameter(own, rounded)
        return output_of(block, parameters, call).float()

    def _error(
        self,
        block: nn.Module,
        schemes: Mapping[str, Scheme],
        weights: dict[str, Tensor],
        pairs: Sequence[tuple[Call, Tensor]],
    ) -> float:
        with torch.no_grad():  # judged as the model will hold them
            own = {name: next(block.get_submodule(name).parameters()).dtype for name in weights}
            kept = {name: w.to(own[name]).float() for name, w in weights.items()}
            errors = (self._run(block, schemes, kept, call) - target for call, target in pairs)
            return sum(float(e.double().square().sum()) for e in errors)


def _rounded(weight: Tensor, fmt: Format) -> Tensor:
    r, shape = fit(weight, fmt), (weight.shape[0], weight.shape[1])
    return round_to(weight, spread(r.scale, shape, fmt.block), spread(r.zero, shape, fmt.block), fmt)


def _sliced(part: Any, count: int, start: int, stop: int) -> Any:
    """Return a call's arguments with every tensor that has a row a window cut to the windows from `start` to `stop`."""
    if isinstance(part, Tensor):
        return part[start:stop] if part.dim() > 1 and part.shape[0] == count else part
    if type(part) in (tuple, list):
        return type(part)(_sliced(item, count, start, stop) for item in part)
    if isinstance(part, dict):
        return {key: _sliced(item, count, start, stop) for key, item in part.items()}
    return part


class _Through(QInput):
    """Rounds like a QInput, and passes gradients straight through (arXiv:1308.3432)."""

    def round(self, x: Tensor) -> Tensor:
        """Return `x` rounded, with the gradient of `x`."""
        return x + (super().round(x.detach()) - x.detach())


@contextmanager
def _rounding_inputs(modules: Mapping[str, nn.Module], schemes: Mapping[str, Scheme]) -> Iterator[None]:
    """Let layers round their inputs meanwhile; what calibration has yet to find is found anew in every input."""
    gated = {name: module for name, module in modules.items() if schemes[name].inputs is not None}
    for name, module in gated.items():
        inputs = schemes[name].inputs
        assert inputs is not None
        activations.gate(module, _Through(replace(inputs, static=False, dynamic=True)))
    try:
        yield
    finally:
        for module in gated.values():
            activations.gate(module)
