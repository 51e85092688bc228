"""Matrix products in float32 on the CPU by oneDNN, which uses what the processor has whoever made it.

What torch takes by itself (MKL) keeps to AVX2 on processors without Intel's name: on one with AVX-512 it is half as
fast. Results differ by rounding alone. Where oneDNN or its operator is missing, torch's own products are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

_ROWS = 16  # below, preparing the weights takes longer than multiplying
_AVAILABLE = bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., in] times weight [out, in] transposed, plus bias [out], as F.linear does."""
    if not _AVAILABLE or torch.is_autocast_enabled("cpu") or not _suits(x, weight, bias):
        return F.linear(x, weight, bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    found: Tensor = _Linear.apply(x, weight, bias) if wanted else _product(x, weight, bias)  # type: ignore[no-untyped-call]
    return found


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tell whether oneDNN is asked for what it computes as F.linear does, and enough of it."""
    return (
        all(map(_fits, (x, weight, bias)))
        and weight.dim() == 2
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() >= _ROWS * x.shape[-1]
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


class _Linear(torch.autograd.Function):
    """The same with gradients, which are two such products; they have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        to_x, to_weight, to_bias = ctx.needs_input_grad
        return (
            _product(rows, weight.T.contiguous()).view(x.shape) if to_x else None,
            _product(rows.T.contiguous(), x.reshape(-1, x.shape[-1]).T.contiguous()) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


class _Fast(TorchFunctionMode):
    """Sends F.linear through `linear`, and leaves all else alone."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return linear(*args) if func is F.linear and not kwargs else func(*args, **(kwargs or {}))


@contextmanager
def fast_linear() -> Iterator[None]:
    """Compute the linear layers of models by `linear` within."""
    if not _AVAILABLE:
        yield
        return
    with _Fast():
        yield


def _fits(value: Tensor | None) -> bool:
    """Tell whether a matrix is dense float32 in main memory; a subclass may be anything."""
    return value is None or (
        type(value) in (Tensor, Parameter)
        and value.device.type == "cpu"
        and value.dtype == torch.float32
        and value.is_contiguous()
        and value.numel() > 0
    )
