"""What every operator makes of a layer: a product of inputs with packed codes, and the module that holds it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn

from quantforge.errors import PlanError


class Kernel(Protocol):
    """A weight [out, in] as one operator wants it. It never changes, so that copies of a model share it."""

    @property
    def operator(self) -> str:
        """Return the operator's name."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return (out, in)."""

    @property
    def nbytes(self) -> int:
        """Count the bytes of all that is held."""

    def product(self, x: Tensor) -> Tensor:
        """Return `x` [tokens, in], one token or more, row after row in memory, times the weight, as rounded inputs
        where the layer rounds them → [tokens, out] in the dtype of `x`, freshly made.
        """


class PackedLinear(nn.Module):
    """A linear layer that holds no float weight: codes as their operator wants them, and a bias.

    Codes stay where and as they were packed, whatever `to` does to the rest of a model. It is for inference: gradients
    do not pass through integers.
    """

    def __init__(self, kernel: Kernel, bias: Tensor | None = None) -> None:
        """Take the bias [out] as it is."""
        super().__init__()
        self.kernel = kernel
        self.out_features, self.in_features = kernel.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [..., out] for `x` [..., in]."""
        # a view of few tokens may lie in memory in another order
        flat = x.reshape(-1, self.in_features).contiguous()
        y = self.kernel.product(flat) if x.numel() else x.new_empty(0, self.out_features)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLinear:
        return PackedLinear(self.kernel, None if self.bias is None else self.bias.clone())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        raise PlanError(
            279, f"{prefix}weight is packed and cannot be saved; load with packed=False, or use `quantforge convert`."
        )

    def extra_repr(self) -> str:
        """Say what it is, as torch prints modules."""
        return f"{self.in_features}, {self.out_features}, operator={self.kernel.operator}"


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    """Count the bytes of dense tensors."""
    return sum(t.numel() * t.itemsize for t in tensors if t is not None)
