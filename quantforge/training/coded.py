"""A linear layer that computes from its codes; scales, zero points, factors, or the weights under them, can train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantforge.distill.straight_through import (
    dequantize_trained,
    learned_quantize,
    range_to_train,
    trained_range,
    with_range,
)
from quantforge.numerics.blocks import within_rows
from quantforge.numerics.grids import Grid
from quantforge.numerics.problem import QWeight
from quantforge.numerics.qtensor import QTensor, quantize
from quantforge.numerics.residuals import LowRank
from quantforge.training.layers import ComputedLinear, as_kept, straight


class CodedLinear(ComputedLinear):
    """A quantized layer that holds its codes, two a byte where they have at most 4 bits, and no float weights.

    Of what `parts` name it has, these are parameters:

        scale           [row blocks, column blocks], what the stored scales are multiplied by, 1 at the beginning: one
                        learning rate then suits all layers and blocks
        zero_point      of the same shape, in units of a code
        latent          [out, in], the weights under the codes
        factorN_a, _b   the factors of residual N; factorN_a_scale, _b_scale as `scale` where they are kept as codes
        bias            [out]
    """

    def __init__(self, own: nn.Module, weight: QWeight, parts: frozenset[str], kept: torch.dtype) -> None:
        """Take the place of `own`, which computes with `weight`; that may lie on another device, and stays there."""
        super().__init__(own, kept)
        weight = _moved(weight, self.device)
        base, self.parts = weight.base, parts
        self.shape, self.grid = base.shape, base.format.grid
        self.narrow = self.grid.bits <= 4 and base.shape[1] % 2 == 0
        self.regular = _regular(base)
        self.table = _pairs(self.grid, base.codes.device) if self.narrow else None
        if {"scales", "zero-points", "weights"} & parts:
            scale, zero = range_to_train(base)
            if "scales" in parts:
                self.scale = nn.Parameter(torch.ones_like(scale))
            if "zero-points" in parts and zero is not None:
                self.zero_point = nn.Parameter(zero)
        if "weights" in parts:
            self.latent = nn.Parameter(base.dequantize(torch.float32))
        none = base.codes.new_empty(0)
        self.codes = none if "weights" in parts else _packed(base.codes) if self.narrow else base.codes
        self.base, self.residuals = replace(base, codes=none), weight.residuals
        for i, factors in self._factors():
            for side in ("a", "b"):
                self._train_factor(f"factor{i}_{side}", getattr(factors, side))
        if self.bias is not None:
            self.bias.requires_grad_("biases" in parts)

    def _factors(self) -> list[tuple[int, LowRank]]:
        """Return the low-rank residuals that are trained, with their places."""
        if "factors" not in self.parts:
            return []
        return [(i, r) for i, r in enumerate(self.residuals) if isinstance(r, LowRank)]

    def _train_factor(self, name: str, part: Tensor | QTensor) -> None:
        if isinstance(part, QTensor):
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones_like(range_to_train(part)[0])))
            part = part.dequantize(torch.float32)
        self.register_parameter(name, nn.Parameter(part.detach().float().clone()))

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that the weight is made of, by name."""
        return {name: value for name, value in self._parameters.items() if value is not None and name != "bias"}

    def computed(self, trained: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [out, in], as a checkpoint would hold it, with gradients for what is trained."""
        if self.dtype != torch.float32:
            return QWeight(self._matrix(), {}, self.residuals).dequantize(self.dtype)
        weight = self._base(trained)
        for i, residual in enumerate(self.residuals):
            if f"factor{i}_a" in trained:
                a, b = (self._factor(f"factor{i}_{side}", getattr(residual, side), trained) for side in ("a", "b"))
                weight = weight + a @ b
            else:
                weight = residual.onto(weight)
        return weight

    def _base(self, trained: Mapping[str, Tensor]) -> Tensor:
        """Return the part of the weight that the codes hold."""
        scale, zero = self._range(trained)
        if "latent" in trained:
            assert scale is not None
            return learned_quantize(trained["latent"], scale, zero, self.base.format)
        if not self.regular:
            matrix = self._matrix()
            return matrix.dequantize(torch.float32) if scale is None else dequantize_trained(matrix, scale, zero)
        if scale is None:
            scale, zero = _dense(self.base.scale), None if self.base.zero is None else _dense(self.base.zero)
        value = self._values().view(*scale.shape, -1)
        if zero is not None:
            value = value - zero[..., None] if zero.requires_grad else value.sub_(zero[..., None])
        value = value * scale[..., None] if scale.requires_grad else value.mul_(scale[..., None])
        value = value.view(self.shape)
        return value if self.base.offset is None else value.add_(self.base.offset)

    def _range(self, trained: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Return scales and zero points in float32 as they would be stored; (None, None) where nothing needs them."""
        if not self.parts & {"scales", "zero-points", "weights"}:
            return None, None
        scale, zero = range_to_train(self.base)
        latent = scale * trained["scale"] if "scale" in trained else scale
        latent_zero = trained.get("zero_point", zero)
        r = trained_range(latent, latent_zero, self.base.format)
        return straight(r.scale, latent), None if latent_zero is None else straight(r.zero, latent_zero)

    def _factor(self, name: str, part: Tensor | QTensor, trained: Mapping[str, Tensor]) -> Tensor:
        """Return one factor as it would be stored."""
        latent = trained[name]
        if not isinstance(part, QTensor):
            return straight(as_kept(latent, part.dtype), latent)
        scale = range_to_train(part)[0] * trained[f"{name}_scale"]
        value = learned_quantize(latent, scale, None, part.format)
        assert isinstance(part.scale, Tensor)
        return straight(as_kept(value, part.scale.dtype), value)  # codes times scales are rounded to their dtype

    def settled(self, weight: QWeight) -> QWeight:
        """Return `weight`, which the layer was made of, with what was trained as its format stores it.

        It lies where `weight` does, wherever the layer is.
        """
        home = weight.base.codes.device
        weight = _moved(weight, self.device)
        trained = {name: value.detach() for name, value in self.trained().items()}
        base, residuals = weight.base, list(weight.residuals)
        scale, zero = self._range(trained)
        if "latent" in trained:
            assert scale is not None
            base = quantize(trained["latent"], trained_range(scale, zero, base.format), base.format)
        elif scale is not None:
            base = with_range(base, scale, zero)
        for i, factors in self._factors():
            sides = (self._stored_factor(f"factor{i}_{side}", getattr(factors, side), trained) for side in ("a", "b"))
            residuals[i] = LowRank(*sides)
        found: QWeight = _moved(replace(weight, base=base, residuals=tuple(residuals)), home)
        return found

    def _stored_factor(self, name: str, part: Tensor | QTensor, trained: Mapping[str, Tensor]) -> Tensor | QTensor:
        if not isinstance(part, QTensor):
            return trained[name].to(part.dtype)
        scale = range_to_train(part)[0] * trained[f"{name}_scale"]
        return quantize(trained[name], trained_range(scale, None, part.format), part.format)

    def _values(self) -> Tensor:
        """Return what the codes mean, before any scale → float32, as many as there are codes."""
        if self.table is not None:
            return self.table.index_select(0, self.codes.flatten().int()).view(torch.float32)
        return self.grid.decode(self.codes)

    def _matrix(self) -> QTensor:
        codes = self.codes
        if self.narrow:
            codes = torch.stack([codes & 15, codes >> 4], -1).view(self.shape)
        return replace(self.base, codes=codes)

    def held(self) -> list[Tensor]:
        """Return every tensor that the frozen part of the weight is held in."""
        return _tensors((self.codes, self.base, self.residuals))

    def _apply(self, fn: Any, recurse: bool = True) -> CodedLinear:
        """Move what is held along to another device; codes and scales keep their dtypes."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self.device = device
            self.codes, self.base, self.residuals, self.table = (
                _moved(part, device) for part in (self.codes, self.base, self.residuals, self.table)
            )
        return self


def _regular(q: QTensor) -> bool:
    """Tell whether blocks are parts of one row that divide it, so that a view of the matrix lays them out."""
    block, cols = within_rows(q.shape, q.format.block), q.shape[1]
    if block is None or block[0] != 1 or q.format.minimum:
        return False
    return block[1] is None or block[1] >= cols or cols % block[1] == 0


def _packed(codes: Tensor) -> Tensor:
    """Return codes [rows, cols] below 16 two a byte, the first in the low half."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def _pairs(grid: Grid, device: torch.device) -> Tensor:
    """Return the two float32 values that each byte of packed codes means, as one number of 64 bits → [256].

    To look up whole numbers is several times as fast as to look up rows of two.
    """
    table = torch.zeros(16, device=device)
    table[: len(grid.values)] = torch.tensor(grid.values, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([table[byte & 15], table[byte >> 4]], -1).view(torch.int64).flatten()


def _dense(x: Tensor | QTensor) -> Tensor:
    """Return scales or zero points in float32."""
    return x.dequantize(torch.float32) if isinstance(x, QTensor) else x.float()


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, tuple):
        return [t for item in part for t in _tensors(item)]
    if is_dataclass(part) and not isinstance(part, Grid):
        return [t for f in fields(part) for t in _tensors(getattr(part, f.name))]
    return []


def _moved(part: Any, device: torch.device) -> Any:
    """Return `part` with all its tensors on a device; itself if they are there."""
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, tuple):
        return tuple(_moved(item, device) for item in part)
    if is_dataclass(part) and not isinstance(part, type) and any(t.device != device for t in _tensors(part)):
        return replace(part, **{f.name: _moved(getattr(part, f.name), device) for f in fields(part)})
    return part
