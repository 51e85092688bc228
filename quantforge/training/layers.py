"""What a student's layers are while it is trained: weights made anew in every pass, inputs and norms rounded straight.

A quantized layer of the model is replaced by one that computes its weight from what is trained; the model's own forward
and all other modules stay. Nothing else of the model gets gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from quantforge.distill.straight_through import fake_quantize_inputs
from quantforge.errors import PlanError
from quantforge.models import activations
from quantforge.numerics.inputs import QInput
from quantforge.numerics.products import fast_linear, linear


class ComputedLinear(nn.Linear):
    """A linear layer whose weight exists while it multiplies, forwards and again backwards, and is not kept.

    Subclasses name what is trained in `trained` and make the weight of it in `computed`. It counts as an nn.Linear, so
    that adapters can be put on it; its `weight` is made anew whenever it is asked for.

    kept  dtype in which a checkpoint stores the bias; the forward computes with the stored value if it is trained
    """

    def __init__(self, own: nn.Module, kept: torch.dtype) -> None:
        """Take the place of `own`, a linear layer, whose weight is let go."""
        nn.Module.__init__(self)
        assert isinstance(own, nn.Linear | Conv1D)
        self.transposed = isinstance(own, Conv1D)
        rows, cols = own.weight.shape
        self.out_features, self.in_features = (cols, rows) if self.transposed else (rows, cols)
        self.kept, self.dtype, self.device = kept, own.weight.dtype, own.weight.device
        self.bias = own.bias
        own.weight = nn.Parameter(torch.empty_like(own.weight, device="meta"), requires_grad=False)
        self._own = (own,)  # in a tuple it is no submodule
        found = activations.find(own)
        if found is not None and found.rounds is not None:
            activations.gate(self, StraightInput(found.rounds.inputs, found.rounds.range, found.rounds.spared))

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that the weight is made of, by name."""
        raise NotImplementedError

    def computed(self, trained: Mapping[str, Tensor]) -> Tensor:
        """Return the weight [out, in] in the layer's dtype, made of these, with their gradients if they are on."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Return the weight [out, in] that the layer computes with; made for every reader."""
        with torch.no_grad():
            return self.computed(self.trained())

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., in] times the weight transposed, plus the bias."""
        bias: Tensor | None = self.bias
        if bias is not None and bias.requires_grad:
            bias = straight(as_kept(bias, self.kept), bias)
        trained = self.trained()
        result: Tensor = _Product.apply(self, x, bias, tuple(trained), *trained.values())  # type: ignore[no-untyped-call]
        return result

    def restored(self, weight: Tensor) -> nn.Module:
        """Return the layer whose place this one took, with `weight` [out, in] and its bias as it will be stored."""
        (own,) = self._own
        value = (weight.T if self.transposed else weight).to(self.dtype)
        own.weight = nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
        if own.bias is not None:
            own.bias = nn.Parameter(as_kept(own.bias.detach(), self.kept) if own.bias.requires_grad else own.bias.data)
        return own


class _Product(torch.autograd.Function):
    """x Wᵀ + b, with W made anew in the backward pass; inputs are kept only where something in W is trained."""

    @staticmethod
    def forward(
        ctx: Any, layer: ComputedLinear, x: Tensor, bias: Tensor | None, names: tuple[str, ...], *trained: Tensor
    ) -> Tensor:
        ctx.layer, ctx.names, ctx.dtype = layer, names, x.dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, *trained)
        return F.linear(x, layer.computed(dict(zip(names, trained, strict=True))), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        trained = [t.detach().requires_grad_(needs) for t, needs in zip(kept, wanted, strict=True)]
        with torch.enable_grad():
            weight = ctx.layer.computed(dict(zip(ctx.names, trained, strict=True)))
        factor = weight.detach().to(upstream.dtype)  # another one under autocast
        to_x = linear(upstream, factor.T.contiguous()).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        rows = upstream.reshape(-1, upstream.shape[-1])
        to_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        found: list[Tensor | None] = [None] * len(trained)
        if any(wanted):
            # `linear`, and operands laid out for it: fast products around a backward pass are off within it
            inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
            to_weight = linear(rows.T.contiguous(), inputs.T.contiguous()).to(weight.dtype)
            gradients = iter(torch.autograd.grad(weight, [t for t in trained if t.requires_grad], to_weight))
            found = [next(gradients) if needs else None for needs in wanted]
        return None, to_x, to_bias, None, *found


class StraightInput(QInput):
    """Rounds like a QInput, and passes gradients straight through (arXiv:1308.3432)."""

    def round(self, x: Tensor) -> Tensor:
        """Return `x` rounded, with the gradient of `x`."""
        return fake_quantize_inputs(x, QInput(self.inputs, self.range, self.spared))


class Kept(nn.Module):
    """A parametrization: computes with a parameter as a checkpoint in `dtype` stores it; gradients pass through."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.kept = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to the dtype and back."""
        return straight(as_kept(x, self.kept), x)


def straight(value: Tensor, latent: Tensor) -> Tensor:
    """Return `value`, bit for bit but for the sign of zeros, with the gradient of `latent`, of the same shape."""
    return value.detach() + (latent - latent.detach())


def as_kept(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` as it comes back from a checkpoint in `dtype`, in its own dtype."""
    return x.to(dtype).to(x.dtype)


def norms(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield every norm of `model`, told by its class's name, with the names of its parameters in turn."""
    for module in list(model.modules()):
        if "norm" in type(module).__name__.lower() and not list(module.children()):
            yield from ((module, name) for name, _ in list(module.named_parameters(recurse=False)))


def train_norms(model: nn.Module, kept: torch.dtype) -> None:
    """Let the norms of `model` be trained; they compute with what a checkpoint in `kept` stores of them.

    A norm's parameter is then called `NORM.parametrizations.weight.original`.
    """
    for module, name in list(norms(model)):
        getattr(module, name).requires_grad_(True)
        parametrize.register_parametrization(module, name, Kept(kept))


def settle_norms(model: nn.Module) -> bool:
    """Give norms that were trained what a checkpoint stores of them; tell whether there were any."""
    found = False
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for name, parts in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
            if any(isinstance(part, Kept) for part in parts):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                found = True
    return found


def check_float32(model: nn.Module) -> None:
    """Raise PlanError unless all parameters of `model` are float32: steps are too small for shorter numbers."""
    dtypes = {p.dtype for p in model.parameters()} - {torch.float32}
    if dtypes:
        raise PlanError(
            294, f"students are trained in float32, and this model is in {dtypes.pop()}; use model.float()."
        )


def checkpoint_blocks(model: Any, *, on: bool) -> None:
    """Turn on or off that only the inputs of decoder blocks are kept for the backward pass."""
    how = {"use_reentrant": False, "context_fn": _alike}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it besides
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        elif model.is_gradient_checkpointing:
            model.gradient_checkpointing_disable()


def _alike() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Have a block compute the same way when it runs again: what is on around a backward pass is off within it."""
    return fast_linear(), fast_linear()


def to_training(model: nn.Module) -> None:
    """Put into training mode what training needs there: blocks with gradient checkpointing, and adapters' dropout.

    All else stays in evaluation mode. The model's own dropout is for training from scratch: with it, a student that
    equals its teacher would differ from it. Blocks in training mode lose theirs where it is a number.
    """
    model.eval()
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            vars(module).update(dict.fromkeys(_dropouts(module), 0.0))
        elif isinstance(module, nn.Dropout) and "lora_dropout" in name.split("."):
            module.training = True


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Have a model as `to_training` puts it, and then as it was."""
    before = [(module, {"training": module.training, **_dropouts(module)}) for module in model.modules()]
    try:
        to_training(model)
        yield
    finally:
        for module, kept in before:
            vars(module).update(kept)


def _dropouts(module: nn.Module) -> dict[str, float]:
    """Return the shares that a module itself drops, such as `attention_dropout` and `layerdrop`."""
    return {key: value for key, value in vars(module).items() if "drop" in key and isinstance(value, float)}


def computed_layers(model: nn.Module) -> dict[str, ComputedLinear]:
    """Return the layers of `model` that compute their weight, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ComputedLinear)}
