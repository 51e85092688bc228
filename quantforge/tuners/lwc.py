"""Learned weight clipping: the ends of every range trained by the gradient of the block's output error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantforge.models import arch
from quantforge.models.walk import Call, finite, output_of
from quantforge.numerics import ranges
from quantforge.numerics.blocks import Flat, spread, tiles
from quantforge.numerics.formats import Format
from quantforge.numerics.grids import IntGrid
from quantforge.numerics.inputs import Scheme
from quantforge.numerics.ranges import Range
from quantforge.registry import register

_START = 4.0  # sigmoid(4) = 0.982 of the range, as OmniQuant begins


@register("tuner", "lwc")
@dataclass(frozen=True)
class LWC:
    """Learned weight clipping (OmniQuant, Shao et al., ICLR 2024, arXiv:2308.13137, section 3.2).

    The largest and the smallest value of every block of weights are multiplied by sigmoid(γ) and sigmoid(β), which are
    trained so that the decoder block's output, on its own inputs, stays what it is in float; rounding passes gradients
    straight through. Min-max ranges are kept where training did not lower the block's error on the same inputs.

    The target is the float block on the inputs that reach it through quantized blocks; the paper adds the float stream.
    All of a block's ranges are kept or given up together.

    epochs  passes over the calibration batches that are used (the paper: 20, of 128 samples one by one)
    share   of the calibration batches that are used, evenly spaced
    rate    learning rate of AdamW (the paper: 0.01, for as many more steps)
    """

    epochs: int = 4
    share: float = 0.5
    rate: float = 0.1

    needs = ("blocks",)

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, not {self.epochs}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie above 0 and be at most 1, not {self.share}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, not {self.rate}; OmniQuant uses 0.01")

    def refuses(self, shape: tuple[int, int], fmt: Format) -> str | None:
        """Return why the ranges of `fmt` cannot be trained; None if they can."""
        plain = isinstance(fmt.scale, torch.dtype) and fmt.zero is None and not isinstance(fmt.block, Flat)
        if not isinstance(fmt.grid, IntGrid) or not plain:
            return f"learned clipping trains the ends of integer ranges, which {fmt} is not; int4-g64-asym is."
        return None

    def tune(
        self, block: nn.Module, schemes: Mapping[str, Scheme], calls: Sequence[Call], float_calls: Sequence[Call]
    ) -> dict[str, Range]:
        """Return the range of each layer, by its name within `block`, as its format stores it.

        calls  the arguments of `block` for every calibration batch; those of the float model play no part
        """
        used = [calls[int(i / self.share)] for i in range(max(1, int(len(calls) * self.share)))]
        layers = [
            _Layer(name, module, scheme.weights)
            for name, scheme, module in ((n, s, block.get_submodule(n)) for n, s in schemes.items())
        ]
        with torch.no_grad():
            pairs = [(call, output_of(block, {}, call)) for call in used]
            pairs = [pair for pair in pairs if finite(*pair)]  # one NaN would be all of the error
            used, targets = [call for call, _ in pairs], [target for _, target in pairs]
            plain = self._error(block, layers, used, targets, trained=False)
        if not plain > 0:
            return {layer.name: layer.range(trained=False) for layer in layers}
        size = plain / sum(t.numel() for t in targets)  # Adam's epsilon must not decide
        parameters = [p for layer in layers for p in (layer.gamma, layer.beta)]
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, eps=1e-12, weight_decay=0.0)
        with torch.enable_grad():
            for _ in range(self.epochs):
                for call, target in zip(used, targets, strict=True):
                    weights = dict(layer.rounded() for layer in layers)
                    loss = F.mse_loss(output_of(block, weights, call).float(), target.float()) / size
                    # only for these: the model's own parameters collect no gradients
                    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.grad = gradient
                    optimizer.step()
        with torch.no_grad():
            better = self._error(block, layers, used, targets, trained=True) < plain
            return {layer.name: layer.range(trained=better) for layer in layers}

    def _error(
        self, block: nn.Module, layers: list[_Layer], calls: Sequence[Call], targets: list[Tensor], *, trained: bool
    ) -> float:
        """Return the summed squared error of the block's output with all its layers rounded, as they will be stored."""
        weights = dict(layer.stored(trained=trained) for layer in layers)
        errors = (output_of(block, weights, c) - t for c, t in zip(calls, targets, strict=True))
        return sum(float(e.double().square().sum()) for e in errors)


class _Layer:
    """One layer's weight [out, in], the ends of its blocks, and what is trained about them."""

    def __init__(self, name: str, module: nn.Module, fmt: Format) -> None:
        self.name, self.weight, self.format = name, arch.get_weight(module), fmt
        self.module = module
        self.low, self.high = tiles(self.weight, fmt.block).aminmax(dim=-1)
        self.gamma = torch.full_like(self.high, _START, requires_grad=True)
        self.beta = torch.full_like(self.low, _START, requires_grad=True)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the trained ends of each block."""
        return self.beta.sigmoid() * self.low, self.gamma.sigmoid() * self.high

    def range(self, *, trained: bool) -> Range:
        """Return the range of the trained or of the original ends, as it will be stored."""
        low, high = self.ends() if trained else (self.low, self.high)
        return ranges.from_limits(low.detach(), high.detach(), self.format)

    def stored(self, *, trained: bool) -> tuple[str, Tensor]:
        """Return the parameter's name and the weight rounded under `range`."""
        r, shape = self.range(trained=trained), (self.weight.shape[0], self.weight.shape[1])
        scale, zero = (spread(x, shape, self.format.block) for x in (r.scale, r.zero))
        return self._parameter(ranges.round_to(self.weight, scale, zero, self.format))

    def rounded(self) -> tuple[str, Tensor]:
        """Return the parameter's name and the weight rounded under the trained ends, with gradients for them."""
        grid, fmt = self.format.grid, self.format
        shape = (self.weight.shape[0], self.weight.shape[1])
        low, high = self.ends()
        if fmt.symmetric:
            scale = 2 * torch.maximum(low.abs(), high.abs()) / (grid.high - grid.low)
            zero = torch.zeros_like(scale)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / (grid.high - grid.low)
        scale = torch.where(scale > 0, scale, 1.0)
        if not fmt.symmetric:
            zero = _through(grid.low - low / scale, (grid.low - low / scale).round()).clamp(grid.low, grid.high)
        s, z = (spread(x, shape, fmt.block) for x in (scale, zero))
        exact = self.weight / s + z
        value = _through(exact, exact.round()).clamp(grid.low, grid.high)
        return self._parameter((value - z) * s)

    def _parameter(self, weight: Tensor) -> tuple[str, Tensor]:
        return f"{self.name}.weight", arch.as_parameter(self.module, weight)


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    """Return `rounded` with the gradient of `x` (straight-through estimator, arXiv:1308.3432)."""
    return x + (rounded - x).detach()
